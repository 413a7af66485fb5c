"""The model card of a run: the README.md that the Hub shows, from the template card.md.jinja.

A card is for other people, so it contains no path of this machine. A model or a dataset in a
directory is named only by the last part of its path.
"""

import re
from pathlib import Path, PureWindowsPath

from support import files, hub, metrics, origin

# The entries of args.json that others may read. Paths, devices and the commit are not published.
SETTINGS = (
    # the adapter and its base
    "rank", "alpha", "dropout", "quant", "double_quant", "dtype", "model_revision",
    # training: with these and the data others can train the adapter again
    "steps", "epochs", "batch_size", "accumulate", "learning_rate", "weight_decay",
    "warmup_steps", "max_length", "loss", "limit", "seed", "processes", "dataset_revision",
)  # fmt: skip
# --dtype, and the name in torch that the example on the card uses
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# What the example on the card loads the adapter from, until it is uploaded
FOLDER = "path/to/this/folder"


def card(directory: Path, prompt: str) -> str:
    """Returns the text of a run's README.md.

    It says what the run's args.json, adapter_config.json and results.json hold. `prompt` is the
    template that the adapter was trained with, for the example on the card.
    """
    directory = Path(directory)
    args = public_args(directory)
    config = public_config(directory)
    results = {}  # until the run has finished its last evaluation
    if (directory / "results.json").is_file():
        results = files.read_json(directory / "results.json")
    base = config["base_model_name_or_path"]
    targets = config["target_modules"]  # a list of names, or one string such as "all-linear"
    if not isinstance(targets, str):
        targets = " ".join(targets)
    settings = {}
    for key in SETTINGS:
        value = args.get(key)
        if value is not None and value is not False:  # but a seed of 0 is shown
            settings[key] = value
    return render(
        metadata=metadata(directory, args, config, results),
        name=directory.resolve().name,
        config=config,
        targets=targets,
        base=base,
        # A directory here means nothing to others, so the example has a placeholder.
        base_path=base if is_on_hub(base, directory) else f"path/to/{base}",
        adapter_path=FOLDER,
        dataset=args["dataset"],
        # The results hold only for a base in 4 bits, so the example loads it in 4 bits.
        quantized=args["quant"] == "nf4",
        double_quantized=bool(args.get("double_quant")),
        dtype=DTYPES[args["dtype"]],
        prompt=prompt,
        stages=list(metrics.stages(results)),
        has_loss=(directory / "loss.png").is_file(),
        settings=settings | {"targets": targets},
        versions=args["versions"],
    )


def render(**values) -> str:
    """Returns the template with these values filled in."""
    import jinja2

    environment = jinja2.Environment(
        # A line with only {% ... %} must leave no empty line, which would end a table.
        trim_blocks=True,
        # Otherwise jinja drops the last line break of a template.
        keep_trailing_newline=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    # HTML escapes would be wrong in Markdown, so the template uses this filter for values.
    environment.filters["plain"] = plain
    return environment.get_template("card.md.jinja").render(values)


def write_card(directory: Path, prompt: str) -> None:
    """Writes README.md into the run's directory. Its example loads the adapter from a folder."""
    with files.replacing(Path(directory) / "README.md") as temporary:
        temporary.write_text(card(directory, prompt), encoding="utf-8")


# -----------------------------------------------------------------------------
# What others may see of a run


def public_args(directory: Path) -> dict:
    """Returns the settings and versions in args.json, and the dataset's public name."""
    args = files.read_json(directory / "args.json")
    if "versions" not in args:
        raise ValueError(f"{directory} is not a run of train.py: its args.json is another one")
    public = {key: args[key] for key in SETTINGS if key in args}
    return public | {
        "dataset": public_name(args["dataset"], directory),
        "versions": args["versions"],
    }


def public_config(directory: Path) -> dict:
    """Returns adapter_config.json with the base model's public name."""
    config = files.read_json(directory / "adapter_config.json")
    base = public_name(config["base_model_name_or_path"], directory)
    return config | {"base_model_name_or_path": base}


def public_name(name: str, directory: Path) -> str:
    """Returns a name on the Hub unchanged, and of a path only the last part."""
    if is_on_hub(name, directory):
        return name
    # Windows paths may contain both / and \, so this class can read the paths of any system.
    # A path such as / has no last part.
    return PureWindowsPath(name).name or "unnamed"


def is_on_hub(name: str, directory: Path) -> bool:
    """Returns whether a name is on the Hub: owner/name, and not a directory here.

    "tiny/data" alone could be either.
    """
    return hub.is_repository(name) and not origin.find(name, directory)


def plain(value) -> str:
    """Returns a value as one line of Markdown, with ? for each character that could be markup."""
    return re.sub(r"[^\w ./+-]", "?", str(value))


def metadata(directory: Path, args: dict, config: dict, results: dict) -> str:
    """Returns the YAML at the top of a card, which the Hub uses to list the model."""
    from huggingface_hub import EvalResult, ModelCardData

    base = config["base_model_name_or_path"]
    dataset = args["dataset"]
    tags = ["lora", "nli"]
    if args["quant"] == "nf4":
        tags.append("qlora")
    accuracies = [
        EvalResult(
            # one of the Hub's task names
            task_type="text-classification",
            dataset_type=dataset if is_on_hub(dataset, directory) else plain(dataset),
            dataset_name=plain(dataset),
            # MNLI is one of several datasets in GLUE.
            dataset_config="mnli" if dataset == "nyu-mll/glue" else None,
            dataset_split=plain(split),
            metric_type="accuracy",
            metric_value=result["accuracy"],
        )
        for split, result in results.get("finetuned", {}).items()
    ]
    # None values are left out. The Hub turns base_model and datasets into links, so directories
    # are left out too.
    data = ModelCardData(
        language="en" if dataset == "nyu-mll/glue" else None,  # rows of your own may have another
        base_model=base if is_on_hub(base, directory) else None,
        library_name="peft",
        datasets=[dataset] if is_on_hub(dataset, directory) else None,
        metrics=["accuracy"],
        pipeline_tag="text-generation",
        tags=tags,
        model_name=plain(directory.resolve().name),
        eval_results=accuracies or None,
    )
    return data.to_yaml()
