"""Command lines: parses the flags of the scripts, checks them, and fills in defaults.

A value that is not given on the command line comes from the first of these that has it: the run
that --resume names, the adapter that --adapter names, tiny/args (if there is no GPU and no
--model), the parser.

torch takes seconds to import, so it is only imported where a default depends on the machine.
Neither --help nor a mistake has to wait for it.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from safetensors import SafetensorError

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
from support.stopping import discard_closed_outputs

ROOT = commands.ROOT
MODEL = "microsoft/phi-2"
DATASET = "nyu-mll/glue"
STEPS = 40_000  # 1.6 passes over MNLI's 392,702 rows, at 16 rows a step

NOTICE = """\
no CUDA device and no --model: taking tiny/args (a model of 3 M parameters, its
data, learning rate and steps) for what is not given.
For phi-2: --model microsoft/phi-2 --dataset nyu-mll/glue"""

# Arguments of a training that are also defaults when its adapter is evaluated or merged.
OF_AN_ADAPTER = (
    "model_revision", "dataset", "dataset_revision", "columns", "labels", "validation",
    "quant", "double_quant", "keep_dequantized", "dtype", "max_length",
)

# Flags that may be given with --resume. Any other flag would change what the run computes.
FREE = (
    # where the model and the rows are now; digests show whether they are the same
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
    """Adds the default to the help text of each flag that takes a value and has a default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.nargs == 0 or action.default is None or "default:" in action.help:
            return action.help
        return f"{action.help} (default: {as_text(action.default)})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations, with @FILE for flags from a file, and --debug.

    A mistake gives one line on stderr and exit status 2.
    """

    def __init__(self, description: str, **options):
        script = commands.from_here(Path(sys.argv[0]))
        super().__init__(
            prog=f"python {commands.quoted(script)}",
            description=description,
            formatter_class=HelpFormatter,
            fromfile_prefix_chars="@",
            # With abbreviations a new flag could change what an old command means.
            allow_abbrev=False,
            **options,
        )
        # -1=contradiction is a value, like -1, not a flag. argparse has no public way to say so.
        self._negative_number_matcher = re.compile(r"-\d+(\.\d+)?(=.*)?$")
        self.add_argument(
            "--debug", action="store_true", help="show the traceback of an error"
        )

    def parse_known_args(self, args=None, namespace=None):
        # argparse reports an @FILE that it cannot open in one line, but not these errors.
        try:
            return super().parse_known_args(args, namespace)
        except (ValueError, RecursionError) as error:  # not UTF-8; it includes itself
            self.error(f"cannot read an @FILE: {error}")

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        """Returns the words in a line of an @FILE, with the quotes and comments of a shell."""
        line = line.removeprefix("\ufeff")  # which editors on Windows put at the start of a file
        # Not by shlex, which also takes a # within a word for a comment. If this # is quoted, the
        # quotation has no end, which is an error.
        words = shlex.shlex(re.sub(r"(^|[ \t])#.*", "", line), posix=True)
        words.commenters = ""
        words.whitespace_split = True
        words.escape = ""  # a backslash is a part of paths on Windows
        try:
            if '\\"' in line:  # in a shell this would be a quote within a word
                raise ValueError("no quote may follow a backslash, but '\"' is a quote")
            return list(words)
        except ValueError as error:
            raise ValueError(f"{error} in {line!r}") from None

    def error(self, message: str):
        if message.startswith("[Errno") or "expected one argument" in message:
            # argparse takes @text for an @FILE and -text for a flag.
            message += " (a value that begins with @ or - is typed as --flag=value)"
        # argparse itself would print the whole usage before the message.
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def typed(self, argv: list[str] | None = None) -> dict:
        """Returns the arguments given on the command line, without any default."""
        # argparse leaves an attribute that already exists as it is, even if it is None.
        nothing = argparse.Namespace(**dict.fromkeys(self.defaults()))
        values = vars(self.parse_args(argv, nothing))
        return {name: value for name, value in values.items() if value is not None}

    def defaults(self) -> dict:
        """Returns the default of each argument."""
        # argparse has no public list of a parser's arguments, hence _actions here and below.
        defaults = {action.dest: action.default for action in self._actions}
        del defaults["help"]
        return defaults

    def check_saved(self, values: dict, source: Path) -> dict:
        """Returns those values from a JSON file that are arguments of this parser, as if typed.

        Raises ValueError, with `source` in its message, if a value would be invalid as a flag.
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


def as_typed(action: argparse.Action, value):
    """Returns a value from JSON as `action` would read it from a command line.

    Raises ValueError or ArgumentTypeError, without the flag's name, if the value is invalid.
    """
    if value is None and action.default is None:  # it was not given
        return None
    if action.nargs == 0:  # a flag that is on or off
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, not {value!r}")
        return value
    if action.nargs:  # several values; --targets all-linear is saved as one
        items = value if isinstance(value, list) else [value]
        return [action.type(str(item)) for item in items]
    # Converted to a string first, so that the flag's own check decides what is valid.
    typed = action.type(str(value)) if action.type else str(value)
    if action.choices and typed not in action.choices:
        raise ValueError(f"must be one of {', '.join(action.choices)}, not {typed}")
    return typed


# -----------------------------------------------------------------------------
# Defaults from a run, from tiny/args, and from the machine


def complete(parser: Parser, typed: dict) -> argparse.Namespace:
    """Returns the arguments of a command line with --model, with all defaults.

    With --adapter, the arguments of the adapter's training become defaults. Raises ValueError if
    nothing names a model and there is a GPU that torch cannot use.
    """
    given = typed
    source = None  # where the adapter comes from
    if "adapter" in typed:
        adapter = hub.find_adapter(typed["adapter"])
        saved, source = adapter_defaults(parser, adapter, typed)
        given = saved | typed | {"adapter": adapter}
        if "model" not in given:
            raise ValueError(f"{adapter} does not name its base model; pass --model")
    values = parser.defaults() | given

    # scripts.describe computes nothing, and has no --device.
    unused = gpu.unusable() if values.get("device", "none") is None else None
    notice = f"this runs on the CPU: {unused}" if unused else None
    if values["model"] is None and not has_gpu():
        if unused:
            raise ValueError(f"{unused}; or --device cpu, which takes the small model in tiny/")
        values |= embedded_defaults(parser) | given
        notice = NOTICE

    fill_in(values)
    args = argparse.Namespace(**values)
    if "adapter" in args:
        args.origin = source
        args.is_dataset_typed = "dataset" in typed
    if processes.IS_FIRST:
        print_notices(args, notice)
    return args


def print_notices(args: argparse.Namespace, notice: str | None) -> None:
    """Prints a notice, and a warning if the device has no instructions for --dtype."""
    if notice:
        print(notice, file=sys.stderr)
    # The dtype may come from a run or an adapter of another machine.
    if "dtype" in args and machine.emulates(args.dtype, args.device):
        print(
            f"{args.device} has no instructions for {args.dtype}: the results are right, but come "
            f"more slowly than with --dtype {machine.fast_dtype(args.device)}",
            file=sys.stderr,
        )


def embedded_defaults(parser: Parser) -> dict:
    """Returns those flags in tiny/args that a parser has, with paths from the current folder."""
    values = train_parser().typed([f"@{ROOT / 'tiny' / 'args'}"])
    for name in ("model", "dataset"):
        values[name] = commands.from_here(ROOT / values[name])
    return {name: value for name, value in values.items() if name in parser.defaults()}


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def fill_in(values: dict) -> None:
    """Fills in the defaults that depend on the machine."""
    # Not defaults of the parser, because complete() asks whether anything names a model.
    values["model"] = values["model"] or MODEL
    if "dataset" in values:
        values["dataset"] = values["dataset"] or DATASET
    if "device" in values:
        values["device"] = values["device"] or ("cuda" if has_gpu() else "cpu")
        values["dtype"] = values["dtype"] or machine.fast_dtype(values["device"])


def adapter_defaults(
    parser: Parser, adapter: Path, typed: dict
) -> tuple[dict, origin.Origin]:
    """Returns the arguments of an adapter's training that a later use needs, and its origin.

    A directory that PEFT has written has no args.json, or another program's. Then only the
    model is known, and the quantisation if our train.py wrote the adapter file. How the rows
    were read is part of the origin, because it only applies to the rows of the training.
    """
    path = adapter / "args.json"
    arguments = files.read_json(path) if path.is_file() else {}
    if "versions" not in arguments:
        arguments = {}
    values = fingerprint.recorded_quantization(adapter)
    values |= {name: arguments[name] for name in OF_AN_ADAPTER if name in arguments}
    # The model in PEFT's file takes precedence, and there may be no args.json at all.
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
    parser = eval_parser()
    typed = parser.typed(argv)
    check_pairs(parser, typed)
    return complete(parser, typed)


def check_pairs(parser: Parser, typed: dict) -> None:
    """Rejects flags that do not go together with pairs that have no label."""
    is_pair = "premise" in typed
    are_lines = typed.get("dataset") == "-"
    if is_pair != ("hypothesis" in typed):
        parser.error("--premise and --hypothesis go together")
    if is_pair and are_lines:
        parser.error("--premise is one pair, --dataset - reads pairs from standard input")
    if are_lines and processes.COUNT > 1:
        # Each process would read a part of the lines, and some lines would be torn apart.
        parser.error("--dataset - is for one process: start python eval.py, not torchrun")
    if is_pair or are_lines:
        for name in ("out", "compare", "split", "limit", "columns", "labels", "validation"):
            if name in typed:
                parser.error(f"--{name} is for a dataset, not for --premise or --dataset -")


# -----------------------------------------------------------------------------
# train.py


def train_parser(description: str = "LoRA over a frozen phi-2 in NF4, on MNLI") -> Parser:
    parser = Parser(
        description,
        epilog="@FILE reads flags from a file, in which # begins a comment: "
        + commands.command("train.py", f"@{commands.from_here(ROOT / 'tiny' / 'args')}"),
    )
    flags.add_model_arguments(parser)
    flags.add_adapter_arguments(parser)
    flags.add_training_arguments(parser)
    flags.add_forward_arguments(parser)
    flags.add_output_arguments(parser)
    return parser


def train_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of train.py."""
    parser = train_parser()
    return complete_training(parser, parser.typed(argv))


def complete_training(parser: Parser, typed: dict) -> argparse.Namespace:
    """Returns the arguments of a training: of a new run, or of the run that it resumes.

    `targets` is a list of names or the string "all-linear". Either `steps` or `epochs` is None.
    `out` is None if a new run should get a new folder in out/, with the name from `new_name`.
    """
    given = typed
    run = run_to_resume(parser, typed)
    if run:
        arguments = resume.saved_arguments(run)
        saved = parser.check_saved(arguments, run)
        refuse_another_run(parser, run, saved, typed)
        # A restart by torchrun repeats the run's own arguments: those do not count as typed.
        others = {name: value for name, value in typed.items() if value != saved.get(name)}
        source = origin.origin(run, arguments, saved)
        given = origin.locate(saved, source, others) | typed | {"resume": run, "out": run}
    if given.get("keep_best") and not given.get("eval_every"):
        parser.error("--keep-best needs --eval-every, which says when to evaluate")
    args = complete(parser, given)
    # --steps excludes --epochs. argparse only checks this for flags that are typed, not for
    # defaults that come from a run or from tiny/args.
    if "epochs" in typed:
        args.steps = None
    elif "steps" in typed:
        args.epochs = None
    elif args.epochs is None and args.steps is None:
        args.steps = STEPS
    if args.targets == ["all-linear"]:  # in PEFT's file this is a string, not a list
        args.targets = "all-linear"
    return args


def run_to_resume(parser: Parser, typed: dict) -> Path | None:
    """Returns the run that --resume names, or that torchrun has restarted."""
    run = typed.get("resume")
    out = typed.get("out")
    if run and out and out.resolve() != run.resolve():
        parser.error(f"--resume {run} writes into {run}, not into --out {out}")
    if run:
        return run
    if processes.MAX_RESTARTS and not out:
        parser.error("torchrun --max-restarts needs --out, so that a restart finds its run")
    # A restart has the command line of the first start, without --resume. If that start was
    # rejected, the folder belongs to another run.
    if processes.RESTARTS and (out / "args.json").is_file():
        owner = files.read_json(out / "args.json").get("torchrun", processes.TORCHRUN)
        return out if owner == processes.TORCHRUN else None
    return None


def refuse_another_run(parser: Parser, run: Path, saved: dict, typed: dict) -> None:
    """Raises ValueError if a typed flag would change what the resumed run computes."""
    differences = []
    for name, value in typed.items():
        # A run of an older version may lack a newer flag: it was trained with the default.
        before = saved.get(name, parser.get_default(name))
        if name not in FREE and value != before:
            flag = "--" + name.replace("_", "-")
            differences.append(f"{flag} {as_text(value)} (it has {as_text(before)})")
    if differences:
        raise ValueError(
            f"{run} cannot resume with {', '.join(differences)}: that would be another run"
        )


def as_text(value) -> str:
    """Returns a value as one would type it."""
    return " ".join(value) if isinstance(value, list) else str(value)


def check_out(out: Path) -> None:
    """Raises ValueError if a new run or evaluation would overwrite what --out contains."""
    if (out / "args.json").exists():
        raise ValueError(
            f"{out} holds a run already: choose another --out, or resume it: "
            f"{commands.resume(out)}"
        )
    # A README.md is there in other projects, and in this one if --out is "".
    for name in ("results.json", "README.md", best.FOLDER):
        if (out / name).exists():
            raise ValueError(f"{out} holds a {name} already: choose another --out")


def new_name(args: argparse.Namespace) -> str:
    """Returns the name of a new run. It includes the time, so it is unique to the second."""
    model = Path(args.model).resolve().name  # "." has a name too
    dataset = Path(args.dataset).resolve().name
    return f"{model}-{dataset}-r{args.rank}-{datetime.now():%Y%m%d-%H%M%S}"


def as_json(args: argparse.Namespace) -> dict:
    """Returns the arguments for args.json. Paths are strings, relative to `started_in`."""
    arguments = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
    }
    return arguments | {"started_in": str(Path.cwd())}


# -----------------------------------------------------------------------------
# What every script does around its main


def answer_help(make_parser: Callable[[], Parser]) -> None:
    """Prints the help of a script and exits, if --help is typed.

    Call it before torch is imported, which takes seconds: a Ctrl-C in them prints one line.
    """
    sys.excepthook = show_uncaught
    if "--help" in sys.argv or "-h" in sys.argv:
        make_parser().parse_args()


def show_uncaught(kind: type, error: BaseException, trace) -> None:
    """Prints a traceback, or for a Ctrl-C one word."""
    if kind is KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def run(main: Callable[[], None]) -> None:
    """Calls a script's main. An error that a user can cause gives one line and exit status 1.

    With --debug it gives a traceback.
    """
    prepare_outputs()
    try:
        main()
    except KeyboardInterrupt as interruption:
        sys.exit(str(interruption) or "interrupted")
    except BrokenPipeError:  # the reader of standard output is gone, as after `| head`
        discard_closed_outputs()
        sys.exit(1)
    except Exception as error:
        # From sys.argv, because the error may come before the arguments are parsed.
        if "--debug" in sys.argv or not is_users(error):
            raise
        sys.exit(one_line(error))


def prepare_outputs() -> None:
    """Makes standard output and standard error write UTF-8, line by line.

    What is written to one that is closed, as by >&-, is discarded.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not a notebook's
            # UTF-8 whatever the locale is; JSON can hold what backslashreplace writes. By default
            # Python buffers files and pipes in blocks: a log would stay empty for minutes.
            stream.reconfigure(
                encoding="utf-8", errors="backslashreplace", line_buffering=True
            )


def is_users(error: Exception) -> bool:
    """Returns whether the user can correct an error. Any other error is a bug."""
    kinds = (ValueError, OSError, OverflowError, SafetensorError)
    return isinstance(error, kinds) or full_memory.is_out_of_memory(error)


def one_line(error: Exception) -> str:
    """Returns what `run` prints for an error: one line, with the process if there are several.

    Notes on the error, such as those from support/full_memory.py, precede its own message.
    """
    process = f"process {processes.NUMBER}: " if processes.COUNT > 1 else ""
    text = ": ".join([*getattr(error, "__notes__", []), str(error) or type(error).__name__])
    # Some libraries raise errors of several lines, and some errors quote a dataset's texts.
    return f"error: {process}{printable(' '.join(text.split()))}"
