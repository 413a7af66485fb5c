"""Command lines: the flags of the scripts, what they may hold, and their defaults.

A value that is not typed comes from the first of these that has it: the run that --resume
names, the adapter that --adapter names, tiny/args (where there is no GPU and no --model),
the parser.

torch takes seconds to import, so it is imported where a default depends on the machine:
neither --help nor a mistake has to wait for it.
"""

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from support import (
    best,
    commands,
    files,
    fingerprint,
    flags,
    full_memory,
    gpu,
    hub,
    machine,
    origin,
    processes,
    resume,
)
from support.letters import printable

ROOT = commands.ROOT
MODEL = "microsoft/phi-2"
DATASET = "nyu-mll/glue"
STEPS = 40_000  # 1.6 passes over MNLI's 392,702 rows, at 16 rows a step

NOTICE = """\
no CUDA device and no --model: taking tiny/args (a model of 3 M parameters, its
data, learning rate and steps) for what is not given.
For phi-2: --model microsoft/phi-2 --dataset nyu-mll/glue"""

# Of a line of an @FILE, all before a # comment: words, in which quotes hold blanks and #
WORDS = re.compile(r"""(?:\s*(?!#)(?:'[^']*'|"[^"]*"|\S)+)*""")
ESCAPE = "" if os.name == "nt" else "\\"  # Windows has backslashes in its paths

# The arguments of a training that its adapter is also evaluated and merged with.
OF_AN_ADAPTER = (
    "model_revision", "dataset", "dataset_revision", "columns", "labels", "validation",
    "quant", "double_quant", "keep_dequantized", "dtype", "max_length",
)

# What may be typed beside --resume. Any other flag would change what the run computes.
FREE = (
    # where the model and the rows are now; digests tell whether they are the same
    "model", "model_revision", "dataset", "dataset_revision",
    # how long it trains, and what it writes on the way
    "steps", "epochs", "eval_every", "log_every", "keep_best", "save_every",
    # memory against speed, with the same results
    "keep_dequantized", "checkpointing", "graphs",
    "wandb", "push", "debug", "resume", "out",
)


# -----------------------------------------------------------------------------
# The parser


class HelpFormatter(argparse.HelpFormatter):
    """Adds its default to the help text of a flag that takes a value, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.nargs == 0 or action.default is None or "default:" in action.help:
            return action.help
        return f"{action.help} (default: {as_text(action.default)})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with full words only, @FILE for flags from a file, and --debug.

    @FILE holds words and # comments as a shell reads them. A mistake is one line on stderr and
    exit status 2.
    """

    def __init__(self, description: str, **options):
        super().__init__(
            prog=command_name(),
            description=description,
            formatter_class=HelpFormatter,
            fromfile_prefix_chars="@",
            # With abbreviations a new flag could change what an old command means.
            allow_abbrev=False,
            **options,
        )
        # A word like -1=contradiction is a value, as -1 is. argparse has no public way to say so.
        self._negative_number_matcher = re.compile(r"-\d+(\.\d+)?(=.*)?$")
        self.add_argument(
            "--debug", action="store_true", help="show the traceback of an error"
        )

    def parse_known_args(self, args=None, namespace=None):
        words = with_home(sys.argv[1:] if args is None else args)
        # argparse makes one line of an @FILE that it cannot open, and of no other one.
        try:
            return super().parse_known_args(words, namespace)
        except UnicodeDecodeError as error:
            self.error(f"an @FILE is not UTF-8: {error}")
        except RecursionError:
            self.error("an @FILE names itself")

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        """Returns the words of a line of an @FILE."""
        line = line.removeprefix("\ufeff")  # with which editors on Windows begin a file
        words = shlex.shlex(WORDS.match(line)[0], posix=True)
        words.whitespace_split = True
        words.commenters = ""  # shlex would take the # within a word for one too
        words.escape = ESCAPE
        try:
            return with_home(words)
        except ValueError as error:
            self.error(f"cannot read the flags in {line!r} of an @FILE: {error}")

    def error(self, message: str):
        if message.startswith("[Errno") or "expected one argument" in message:
            # argparse takes @text for an @FILE and -text for a flag.
            message += " (a value that begins with @ or - is typed as --flag=value)"
        # argparse would print the whole usage before the mistake.
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def typed(self, argv: list[str] | None = None) -> dict:
        """Returns what is typed, without any default."""
        return not_none(self.parse_args(argv, self.nothing()))

    def nothing(self) -> argparse.Namespace:
        """Returns a namespace in which no default is filled in."""
        # argparse fills in no attribute that is there already, even one that is None.
        # It has no public list of a parser's arguments, hence _actions here and below.
        return argparse.Namespace(**{action.dest: None for action in self._actions})

    def check_saved(self, values: dict, source: Path) -> dict:
        """Returns those values from a JSON file that are arguments here, as if typed.

        Raises ValueError, which names `source`, for a value that could not be typed.
        """
        saved = {}
        for action in self._actions:
            if action.dest not in values:
                continue
            try:
                saved[action.dest] = as_typed(action, values[action.dest])
            except (argparse.ArgumentTypeError, ValueError) as error:
                flag = action.option_strings[0]
                raise ValueError(f"the arguments in {source}: {flag} {error}") from None
        return saved


def with_home(words: Iterable[str]) -> list[str]:
    """Returns the words of a command line with the home folder in @~/FILE, which no shell puts."""
    return [
        f"@{os.path.expanduser(word[1:])}" if word.startswith("@~") else word for word in words
    ]


def command_name() -> str:
    """Returns the command of this script: "python train.py", "python -m scripts.merge"."""
    # Of a script that -m has started, argv[0] is its path too.
    return f"python {commands.quoted(*commands.name_of(Path(sys.argv[0]).absolute()))}"


def not_none(args: argparse.Namespace) -> dict:
    """Returns the arguments that have a value."""
    return {name: value for name, value in vars(args).items() if value is not None}


def as_typed(action: argparse.Action, value):
    """Returns a value from JSON as `action` would read it from a command line.

    Raises ValueError or ArgumentTypeError, without the flag's name, where it could not.
    """
    if value is None and action.default is None:  # it was not given
        return None
    if action.nargs == 0:  # a flag that is on or off
        return require(value, bool, "true or false")
    if action.nargs in ("+", 3):
        if isinstance(value, str):  # --targets all-linear is saved as one text
            return [value]
        values = require(value, list, "a list")
        return [action.type(require(item, str, "text")) for item in values]
    # By way of a text, so that the flag's own check decides what is valid.
    typed = action.type(str(value)) if action.type else str(value)
    if isinstance(typed, str | Path):
        require(value, str, "text")
    if action.choices and typed not in action.choices:
        raise ValueError(f"must be one of {', '.join(action.choices)}, not {typed}")
    return typed


def require(value, kind: type, name: str):
    """Returns the value if it is of this kind. Raises ValueError for any other."""
    if not isinstance(value, kind):
        raise ValueError(f"must be {name}, not {value!r}")
    return value


# -----------------------------------------------------------------------------
# Defaults, from a run, from tiny/args, from the machine


def parse_arguments(
    parser: Parser,
    argv: list[str] | None = None,
    check: Callable[[Parser, argparse.Namespace], None] | None = None,
) -> argparse.Namespace:
    """Parses a command line with --model and --dataset, and fills in every default.

    Where the parser has --adapter, the adapter's own arguments are defaults. `check` may
    refuse arguments that do not go together; what it raises comes before any notice.
    """
    # First pass: what is typed decides where the defaults come from.
    typed = parser.typed(argv)
    source = None  # of the adapter
    if "adapter" in typed:
        adapter = hub.find_adapter(typed["adapter"])
        defaults, source = adapter_defaults(parser, adapter, typed)
        if "model" not in typed | defaults:
            raise ValueError(f"{adapter} does not name its base model; pass --model")
        parser.set_defaults(**defaults)
    embedded = embedded_defaults(parser, typed)
    parser.set_defaults(**embedded)

    # Second pass: the same command line over these defaults.
    args = parser.parse_args(argv)
    if "adapter" in typed:
        args.adapter = adapter
    if "adapter" in args:
        args.origin = source
        args.is_dataset_typed = "dataset" in typed
    fill_in(args)
    if check:
        check(parser, args)
    unused = None if embedded else unused_gpu(parser, typed)
    notice = f"this runs on the CPU: {unused}" if unused else NOTICE
    if processes.IS_FIRST and (embedded or unused):
        print(notice, file=sys.stderr)
    # It may be that of a run, or of an adapter, from another machine.
    if processes.IS_FIRST and "dtype" in args:
        warn_of_emulation(args.dtype, args.device)
    return args


def warn_of_emulation(dtype: str, device: str) -> None:
    """Prints a line where a device has no instructions for --dtype."""
    if not machine.emulates(dtype, device):
        return
    print(
        f"{device} has no instructions for {dtype}: the results are right, but slower to come "
        f"than with --dtype {machine.fast_dtype(device)}",
        file=sys.stderr,
    )


def embedded_defaults(parser: Parser, typed: dict) -> dict:
    """Returns what tiny/args says where nothing names a model and no GPU could run phi-2.

    Its paths are right from the current directory. Anywhere else there are no such defaults.
    Raises ValueError where there is a GPU, and torch cannot use it.
    """
    if "model" in typed or parser.get_default("model") is not None:
        return {}
    import torch

    if torch.cuda.is_available():
        return {}
    reason = unused_gpu(parser, typed)
    if reason:
        raise ValueError(f"{reason}; or --device cpu, which takes the small model in tiny/")
    # It is written for train.py; other scripts have not all of its flags.
    known, _ = parser.parse_known_args([f"@{ROOT / 'tiny' / 'args'}"], parser.nothing())
    values = not_none(known)
    for name in ("model", "dataset"):
        values[name] = commands.from_here(ROOT / values[name])
    return values


def unused_gpu(parser: Parser, typed: dict) -> str | None:
    """Returns a line on a GPU that torch cannot use, unless --device says what to use."""
    has_device = "device" in parser.nothing()  # describe.py computes nothing
    if not has_device or "device" in typed or parser.get_default("device") is not None:
        return None
    return gpu.unusable()


def fill_in(args: argparse.Namespace) -> None:
    """Fills in the defaults that depend on the machine."""
    # Not defaults of the parser: embedded_defaults asks whether anything names a model.
    if args.model is None:
        args.model = MODEL
    if args.dataset is None:
        args.dataset = DATASET
    # Some scripts have no --device and no --dtype.
    if "device" in args and args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if "dtype" in args and args.dtype is None:
        args.dtype = machine.fast_dtype(args.device)


def adapter_defaults(
    parser: Parser, adapter: Path, typed: dict
) -> tuple[dict, origin.Origin]:
    """Returns those arguments of an adapter's training that a user of it needs.

    A directory that PEFT has written holds no args.json, or another program's; then only the
    model is known, and where our adapter file is alone, the quantisation. How the rows were
    read is not among them: it stands in the second value, and holds for these rows alone.
    """
    path = adapter / "args.json"
    arguments = files.read_json(path) if path.is_file() else {}
    if "versions" not in arguments:
        arguments = {}
    values = fingerprint.recorded_quantization(adapter)
    values |= {name: arguments[name] for name in OF_AN_ADAPTER if name in arguments}
    # PEFT's file has the last word on the model: its writer may have no args.json at all.
    config = files.read_json(adapter / "adapter_config.json")
    if config.get("base_model_name_or_path"):
        values["model"] = config["base_model_name_or_path"]
    if config.get("revision"):
        values["model_revision"] = config["revision"]
    saved = parser.check_saved(values, adapter)
    source = origin.origin(adapter, arguments, saved)
    for name in origin.SETTINGS:
        saved.pop(name, None)
    return origin.locate(saved, source, typed), source


# -----------------------------------------------------------------------------
# eval.py


def eval_parser() -> Parser:
    parser = Parser("accuracy on MNLI, or the answer to one pair")
    flags.add_model_arguments(parser)
    flags.add_eval_arguments(parser)
    return parser


def eval_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of eval.py."""
    return parse_arguments(eval_parser(), argv, check_eval)


def check_eval(parser: Parser, args: argparse.Namespace) -> None:
    """Refuses flags that do not go together, and an --out that holds other results."""
    if (args.premise is None) != (args.hypothesis is None):
        parser.error("--premise and --hypothesis go together")
    if args.dataset == "-" and args.premise is not None:
        parser.error("--premise is one pair, --dataset - reads pairs from standard input")
    if args.dataset == "-" and processes.COUNT > 1:
        # Each process would take a part of the lines, and tear them.
        parser.error("--dataset - is for one process: start python eval.py, not torchrun")
    if args.dataset == "-" or args.premise is not None:
        # These flags are about rows with labels; a typed pair has none.
        for name in ("out", "compare", "split", "limit", "columns", "labels", "validation"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} is for a dataset, not for --premise or --dataset -")
    if args.out:
        check_out(args.out)


# -----------------------------------------------------------------------------
# train.py


def train_parser(description: str = "LoRA over a frozen phi-2 in NF4, on MNLI") -> Parser:
    parser = Parser(
        description,
        epilog="@FILE reads flags from a file, written as in a shell: "
        + commands.command("train.py", f"@{commands.from_here(ROOT / 'tiny' / 'args')}"),
    )
    flags.add_model_arguments(parser)
    flags.add_adapter_arguments(parser)
    flags.add_training_arguments(parser)
    flags.add_forward_arguments(parser)
    flags.add_output_arguments(parser)
    return parser


def train_arguments(
    argv: list[str] | None = None, parser: Parser | None = None
) -> argparse.Namespace:
    """Returns the arguments of train.py: a new run's, or those of the run that it resumes.

    `targets` is a list of names or the word "all-linear". `steps` or `epochs` is None. `out` is
    None where a new run is to have a folder of its own, below out/ and called `new_name`.
    """
    parser = parser or train_parser()
    typed = parser.typed(argv)
    run = run_to_resume(parser, typed)
    if run:
        arguments = resume.saved_arguments(run)
        saved = parser.check_saved(arguments, run)
        refuse_another_run(parser, run, saved, typed)
        # What a restart by torchrun types again is the run's own.
        others = {name: value for name, value in typed.items() if value != saved.get(name)}
        source = origin.origin(run, arguments, saved)
        parser.set_defaults(**origin.locate(saved, source, others))
        parser.set_defaults(resume=run, out=run)
    args = parse_arguments(parser, argv, check_train)
    # A default of the one, from a run or from tiny/args, must not stand beside the other.
    # argparse's exclusive groups look at what is typed and not at defaults.
    if "epochs" in typed:
        args.steps = None
    elif "steps" in typed:
        args.epochs = None
    elif args.epochs is None and args.steps is None:
        args.steps = STEPS
    if args.targets == ["all-linear"]:  # PEFT's file holds this word as a text, no list
        args.targets = "all-linear"
    return args


def run_to_resume(parser: Parser, typed: dict) -> Path | None:
    """Returns the run that --resume names, or that torchrun has started again."""
    run = typed.get("resume")
    out = typed.get("out")
    if run and out and out.resolve() != run.resolve():
        parser.error(f"--resume {run} writes into {run}, not into --out {out}")
    if run:
        return run
    if processes.MAX_RESTARTS and not out:
        parser.error("torchrun --max-restarts needs --out, so that a restart finds its run")
    # A restart has the command line of the start, without --resume. Where the start was refused
    # the folder is another one's.
    if processes.RESTARTS and (out / "args.json").is_file():
        owner = files.read_json(out / "args.json").get("torchrun", processes.TORCHRUN)
        return out if owner == processes.TORCHRUN else None
    return None


def refuse_another_run(parser: Parser, run: Path, saved: dict, typed: dict) -> None:
    """Raises ValueError when a typed flag would change what the resumed run computes."""
    differences = []
    for name, value in typed.items():
        # An older run may lack a flag that is new: it was trained with the default.
        before = saved.get(name, parser.get_default(name))
        if name not in FREE and value != before:
            flag = "--" + name.replace("_", "-")
            differences.append(f"{flag} {as_text(value)} (it has {as_text(before)})")
    if differences:
        raise ValueError(
            f"{run} cannot resume with {', '.join(differences)}: that would be another run"
        )


def as_text(value) -> str:
    """Returns a value as it is typed."""
    return " ".join(value) if isinstance(value, list) else str(value)


def check_train(parser: Parser, args: argparse.Namespace) -> None:
    """Refuses flags that do not go together, and a new run that would write over another one."""
    if args.keep_best and not args.eval_every:
        parser.error("--keep-best needs --eval-every, which says when to look")
    # Only the first process looks, because it is the one that writes there.
    if processes.IS_FIRST and args.out and not args.resume:
        check_out(args.out)


def check_out(out: Path) -> None:
    """Raises ValueError where a new run or evaluation would write over what --out holds."""
    if out.is_file():
        raise ValueError(f"--out {out} is a file: pass a folder")
    if (out / "args.json").exists():
        raise ValueError(
            f"{out} holds a run already: choose another --out, or resume it: "
            f"{commands.resume(out)}"
        )
    # README.md: as in somebody's project, or with --out "".
    for name in ("results.json", "README.md", best.FOLDER):
        if (out / name).exists():
            raise ValueError(f"{out} holds a {name} already: choose another --out")


def new_name(args: argparse.Namespace) -> str:
    """Returns a new run's name. The time in it makes it one of its own but for the second."""
    parts = (
        Path(args.model).resolve().name,  # "." has a name too
        Path(args.dataset).resolve().name,
        f"r{args.rank}",
        time.strftime("%Y%m%d-%H%M%S"),
    )
    return "-".join(parts)


def as_json(args: argparse.Namespace) -> dict:
    """Returns the arguments as args.json holds them: paths are texts, from `started_in`."""
    arguments = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
    }
    return arguments | {"started_in": str(Path.cwd())}


# -----------------------------------------------------------------------------
# The frame of every script


def answer_help(make_parser: Callable[[], Parser]) -> None:
    """Prints the help of a script and ends it, where --help is typed.

    To be called before torch is imported, which takes seconds: a Ctrl-C in them is one line.
    """
    sys.excepthook = show_uncaught
    if "--help" in sys.argv or "-h" in sys.argv:
        make_parser().parse_args()


def show_uncaught(kind: type, error: BaseException, trace) -> None:
    """Prints a traceback, but of a Ctrl-C only that it came."""
    if kind is KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def run(main: Callable[[], None]) -> None:
    """Calls a script's main. An error that a user can cause is one line and exit status 1.

    With --debug it is a traceback.
    """
    prepare_outputs()
    try:
        main()
    except KeyboardInterrupt as interruption:
        sys.exit(str(interruption) or "interrupted")
    except BrokenPipeError:
        # Nobody reads standard output any more, as after `| head`. Python flushes it once
        # more at its end, and would print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        # From sys.argv, because the error may come before the arguments are parsed.
        if "--debug" in sys.argv or not is_users(error):
            raise
        sys.exit(one_line(error))


def prepare_outputs() -> None:
    """Makes standard output and error write UTF-8, line by line, and nowhere where closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            # UTF-8 whatever the locale says; JSON can hold what backslashreplace writes. Into a
            # file or a pipe Python writes in blocks: a log would stay empty for minutes.
            stream.reconfigure(
                encoding="utf-8", errors="backslashreplace", line_buffering=True
            )


def is_users(error: Exception) -> bool:
    """Returns whether a user can put an error right. Any other one is a bug."""
    if type(error).__name__ == "SafetensorError":  # by its name, to import nothing here
        return True
    kinds = (ValueError, OSError, OverflowError)
    return isinstance(error, kinds) or full_memory.is_out_of_memory(error)


def one_line(error: Exception) -> str:
    """Returns what `run` prints of an error: one line, with the process if there are more.

    Before the error's own text stand its notes, such as those of support/full_memory.py.
    """
    process = f"process {processes.NUMBER}: " if processes.COUNT > 1 else ""
    text = ": ".join([*getattr(error, "__notes__", []), str(error) or type(error).__name__])
    # Libraries raise errors of several lines, and others quote texts of a dataset.
    return f"error: {process}{printable(' '.join(text.split()))}"
