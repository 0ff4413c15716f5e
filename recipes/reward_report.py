"""Before PPO: a certificate of a reward model, as one page. Is it good enough?

python recipes/reward_report.py --config recipes/quickstart/reward_report.yaml [--samples samples.jsonl]
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict

from rlhf_recipes.config import DataArguments, parse_stage, validate_fields
from rlhf_recipes.data import load_rows, load_splits, to_preferences
from rlhf_recipes.data.preferences import compared_pairs, to_preference_table
from rlhf_recipes.models import model_options
from rlhf_recipes.reward_modeling import RewardModelConfig
from rlhf_recipes.tools.certificate import certify, load_scorer, reward_bench, write_certificate


@dataclass
class ReportArguments:
    """The reward model, the rows to measure it on beside the held-out pairs, and the folder of the page."""

    output_dir: str = field(metadata={"help": "Where certificate.json and certificate.html go."})
    reward_adapter: str | None = field(
        default=None,
        metadata={"help": "Folder of the reward stage. null: `model_name_or_path` is the whole reward model."},
    )
    samples: str | None = field(
        default=None,
        metadata={"help": "Policy samples: a file with `prompt`, `completion` and perhaps gold scores."},
    )
    gold_column: str = field(default="gold_score", metadata={"help": "Column of the samples with gold scores."})
    category_column: str | None = field(default=None, metadata={"help": "Column of the pairs with their kind."})
    margin_column: str = field(
        default="margin", metadata={"help": "Column of the pairs with the strength of each preference."}
    )
    reward_bench: str | None = field(default=None, metadata={"help": "Local file of RewardBench or RewardBench 2."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longer texts are left out. null: the context of the model."}
    )
    batch_size: int = field(default=32, metadata={"help": "Texts per forward pass."})
    train_rows: int = field(default=500, metadata={"help": "Training pairs that are scored, to see the gap."})
    probe_rows: int = field(default=200, metadata={"help": "Pairs whose texts are changed, to see what matters."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of rows."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of the model may run."})

    def __post_init__(self):
        validate_fields(self)
        for name in ("batch_size", "train_rows", "probe_rows", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


ARGUMENTS = (DataArguments, ReportArguments, RewardModelConfig)


def main(data_args: DataArguments, args: ReportArguments, model_args: RewardModelConfig) -> None:
    # 1. The reward model, as it was saved.
    scorer = load_scorer(
        model_args.model_name_or_path,
        args.reward_adapter,
        max_length=args.max_length,
        batch_size=args.batch_size,
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
        **model_options(model_args),
    )

    # 2. The same split as the reward stage: what it held out is measured, what it saw gives the gap.
    rows = load_splits(data_args, to_rows, scorer.tokenizer.chat_template)
    if "completions" in rows["test"].column_names:
        rows = DatasetDict({name: compared_pairs(split) for name, split in rows.items()})
    samples = None if args.samples is None else load_rows(args.samples)

    # 3. Measures, verdict, page.
    measures = certify(
        scorer,
        rows["test"],
        train=rows["train"],
        samples=samples,
        category_column=args.category_column,
        margin_column=args.margin_column,
        gold_column=args.gold_column,
        train_rows=args.train_rows,
        probe_rows=args.probe_rows,
        seed=args.seed,
    )
    if args.reward_bench is not None:
        measures["reward_bench"] = reward_bench(scorer, args.reward_bench)
    model = args.reward_adapter or model_args.model_name_or_path
    write_certificate(measures, args.output_dir, title=f"Reward model {model} on {data_args.dataset_name}")

    verdict = measures["verdict"]
    print(f"{verdict['verdict']}: {Path(args.output_dir, 'certificate.html')}")
    for reason in verdict["reasons"]:
        print(f"  [{reason['level']}] {reason['text']}")


def to_rows(dataset: Dataset, *, drop_bad_rows: bool = False) -> Dataset:
    """Keep pairs of `chosen` and `rejected` as they are, and read rows of any other kind into the preference table."""
    names = set(dataset.column_names)
    pairs = {"chosen", "rejected"} <= names and "num_correct" not in names
    return (to_preferences if pairs else to_preference_table)(dataset, drop_bad_rows=drop_bad_rows)


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
