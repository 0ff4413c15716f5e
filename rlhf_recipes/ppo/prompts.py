"""The rows of a PPO run: data sets and streams, and what each prompt must have before anything is sampled from it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset

from rlhf_recipes.data.chat_templates import check_prompt_format
from rlhf_recipes.data.context import context_length
from rlhf_recipes.data.dialogues import BadRow, check_kind
from rlhf_recipes.data.formats import encode_prompts
from rlhf_recipes.data.reward_prompts import REWARD_PROMPT, reward_prompt_problem
from rlhf_recipes.messages import image_columns
from rlhf_recipes.models.images import chat_with_images

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_recipes.models.images import ImageReader
    from rlhf_recipes.models.roles import Roles
    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.ppo.group_config import Config


@dataclass(frozen=True)
class PromptRules:
    """What holds for every prompt of a run.

    Attributes:
        tokenizer: The policy's tokenizer.
        longest: Tokens that the context leaves for a prompt.
        embeddings: Tokens that the policy's embeddings know.
        template_kwargs: What chat templates get besides, `PPOConfig.chat_template_kwargs`.
        columns: Columns that a reward cannot do without, each with the reward's name.
        for_rewards: Why rows must have a column `reward_prompt`, if they must.
        reward_prompts_fit: Whether reward prompts must keep to these rules too, since an adapter on the policy's base
            reads them.
        images: What reads the pictures of rows; `None` with a tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase
    longest: int
    embeddings: int
    template_kwargs: dict[str, Any]
    columns: dict[str, str] = field(default_factory=dict)
    for_rewards: str | None = None
    reward_prompts_fit: bool = False
    images: ImageReader | None = None

    def encode(self, prompts: list[Any]) -> list[list[int]]:
        """Token ids of prompts, as the rollout makes them."""
        if self.images is not None:
            return self.images.encode(prompts, **self.template_kwargs)[0]
        return encode_prompts(prompts, self.tokenizer, **self.template_kwargs)

    def problem(self, ids: list[int]) -> tuple[str, str] | None:
        """Say what is wrong with a prompt, and how to put it right; `None` if nothing is.

        Example:
            >>> rules = PromptRules(None, longest=8, embeddings=32, template_kwargs={})
            >>> rules.problem([3, 4])
            >>> rules.problem([3, 32])[0]
            'has the token 32, and the embeddings of the model end at 31'
        """
        if not ids:
            return "has no token", "Remove such rows"
        if len(ids) > self.longest:
            return (
                f"has {len(ids)} tokens, and the context leaves {self.longest} for a prompt",
                "Shorten or remove such rows, make pictures smaller, lower `max_completion_length`, or use a model "
                "with a longer context",
            )
        if max(ids) >= self.embeddings:
            return (
                f"has the token {max(ids)}, and the embeddings of the model end at {self.embeddings - 1}",
                "Give the model's own tokenizer, or call `model.resize_token_embeddings(len(tokenizer))`",
            )
        return None


def prompt_rules(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: Config,
    images: ImageReader | None = None,
) -> PromptRules:
    """Derive the rules from a policy, and check its tokenizer.

    Args:
        policy: The policy, with or without an adapter.
        tokenizer: Its tokenizer.
        args: `max_completion_length`, and `chat_template_kwargs`.
        images: What reads the pictures of rows, with a processor.

    Raises:
        ValueError: If the tokenizer has no padding or end token, or one beyond the embeddings.
    """
    embeddings = policy.get_input_embeddings().weight.size(0)
    longest = (context_length(policy) or sys.maxsize) - (args.max_completion_length or 0)
    for name in ("pad_token", "eos_token"):
        token, number = getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")
        if number is None:
            raise ValueError(
                f"`processing_class` has no `{name}`: prompts are padded into batches, and completions end at the end "
                f"token. Set `tokenizer.{name}`; `tokenizer.pad_token = tokenizer.eos_token` is handled."
            )
        if number >= embeddings:
            raise ValueError(
                f"The {name} {token!r} of the tokenizer has the number {number}, and the embeddings of the model end "
                f"at {embeddings - 1}. Choose a token that the model knows, or call "
                "`model.resize_token_embeddings(len(tokenizer))` first."
            )
    template: Any = args.chat_template_kwargs or {}  # text, by its annotation, on the command line only
    return PromptRules(tokenizer, longest, embeddings, template, images=images)


def with_columns_of_rewards(rules: PromptRules, rewards: list[Any], train_dataset: Any, roles: Roles) -> PromptRules:
    """Add what holds for the columns that rewards read: a gate's, and `reward_prompt`, which all rows have or none.

    Args:
        rules: The other rules.
        rewards: What scores the completions.
        train_dataset: The training data.
        roles: The roles on the policy's base, of which reward adapters have heads.
    """
    columns = getattr(train_dataset, "column_names", None) or ()
    reason = next((_needed(reward) for reward in rewards if getattr(reward, "needs_reward_prompt", False)), None)
    blind = [reward for reward in rewards if hasattr(reward, "needs_reward_prompt") and not _reads_images(reward)]
    if reason is None and blind and image_columns(columns):
        reason = f"{blind[0].__name__!r} reads text and does not see the pictures"
    if reason is None and REWARD_PROMPT in columns:
        reason = "the rows of `train_dataset` have it, and scores are compared"
    needed = {name: reward.__name__ for reward in rewards for name in getattr(reward, "needed_columns", ())}
    return replace(rules, columns=needed, for_rewards=reason, reward_prompts_fit=bool(roles.heads))


def _reads_images(reward: Any) -> bool:
    return bool(getattr(reward, "reads_images", False))


def _needed(reward: Any) -> str:
    return f"the reward model {reward.__name__!r} was trained on rows that have it"


def training_rows(dataset: Any, rules: PromptRules, args: PPOConfig, policy: Any) -> Any:
    """Check the training data and their format, and make a stream endless.

    Raises:
        ValueError: If the configuration asks for what a stream cannot give.
    """
    rows = check_rows(dataset, "train_dataset", rules, args.prompts_per_rollout)
    if rules.images is None:
        check_prompt_format(rows, rules.tokenizer, policy, rules.template_kwargs)
    if not isinstance(rows, IterableDataset):
        return rows
    if args.max_steps <= 0:
        raise ValueError("`train_dataset` is a stream, and its length is not known. Set `max_steps`.")
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise ValueError(f"`{name}` is 'epoch', but a stream (`train_dataset`) has no epochs. Set it to 'steps'.")
    return endless(rows, args.prompts_per_rollout, args.seed if args.shuffle_dataset else None)


def evaluation_rows(dataset: Any, rules: PromptRules, policy: Any) -> Any:
    """Check the evaluation data, if there are any, and their format."""
    if dataset is None:
        return None
    rows = check_rows(dataset, "eval_dataset", rules)
    if rules.images is not None:
        return rows
    for each in rows.values() if isinstance(rows, dict) else [rows]:
        check_prompt_format(each, rules.tokenizer, policy, rules.template_kwargs)
    return rows


def check_rows(dataset: Any, name: str, rules: PromptRules, needed: int = 1) -> Any:
    """Check the rows of a run: those of a data set now, those of a stream as they come.

    Args:
        dataset: A `Dataset`, an `IterableDataset`, or a dictionary of such.
        name: The argument's name, for the messages.
        rules: What holds for every prompt.
        needed: Different prompts in one rollout. TRL drops an incomplete one, so with fewer nothing would be trained.

    Returns:
        The same, with streams that check their rows.

    Raises:
        TypeError: If it is neither.
        ValueError: If there is no column `prompt`, there are too few rows, or a prompt cannot be used; for a stream
            when that row comes.
    """
    if isinstance(dataset, dict):
        return type(dataset)(
            {key: check_rows(rows, f"{name}[{key!r}]", rules, needed) for key, rows in dataset.items()}
        )
    check_is_dataset(dataset, name)
    if rules.longest < 1:
        raise ValueError(
            f"The context leaves {rules.longest} tokens for a prompt. Lower `max_completion_length`, or use a model "
            "with a longer context."
        )
    if isinstance(dataset, IterableDataset):
        _check_columns(next(iter(dataset), {}), name, rules)
        return dataset.map(_stream_check(name, rules), with_indices=True, features=dataset.features)
    _check_columns(dataset.column_names, name, rules)
    if len(dataset) < needed:
        raise ValueError(
            f"One rollout takes {needed} different prompts, but the dataset has {len(dataset)} (`{name}`). Give more "
            "prompts, or lower `per_device_train_batch_size` or `gradient_accumulation_steps`, or raise "
            "`num_generations`."
        )
    if rules.images is None:
        _check_all(list(dataset["prompt"]), name, rules)
    else:
        _check_chats(dataset, name, rules)
    if REWARD_PROMPT in dataset.column_names:
        read = ["prompt", REWARD_PROMPT, *image_columns(dataset.column_names)]
        rows = dataset.select_columns(read).with_format(None)
        problems = {index: problem for index, row in enumerate(rows) if (problem := _reward_problem(row, rules))}
        if problems:
            index, what = next(iter(problems.items()))
            raise ValueError(f"`{name}`: {len(problems)} of {len(dataset)} rows cannot be used; row {index}: {what}.")
    return dataset


def check_is_dataset(dataset: Any, name: str) -> None:
    """Refuse what is no data set of the `datasets` library.

    Raises:
        TypeError: With what to do instead.
        ValueError: If it is missing.
    """
    if dataset is None:
        raise ValueError(f"`{name}` is missing: the training needs rows with a column `prompt`.")
    if isinstance(dataset, dict):
        raise TypeError(f"`{name}` is a {type(dataset).__name__}. Give one of its splits, {sorted(dataset)}.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`{name}` must be a `datasets.Dataset` or `datasets.IterableDataset`, got {type(dataset).__name__}. Make "
            "one with `datasets.Dataset.from_list(rows)`, of rows such as `{'prompt': 'Why is the sky blue?'}`."
        )


def endless(stream: IterableDataset, needed: int, seed: int | None) -> IterableDataset:
    """Read a stream again and again, each time in a new order, so that a place in it is known by its number alone.

    A run that resumes skips as many rows as it has seen, however often the stream has ended before.

    Args:
        stream: The rows.
        needed: Different prompts in one rollout.
        seed: Seed of the orders; `None` keeps the stream's own order. The rows are shuffled within a buffer, as
            `IterableDataset.shuffle` does it.

    Returns:
        A stream without an end. It raises `ValueError` if the rows do not suffice for one rollout.

    Example:
        >>> from itertools import islice
        >>> rows = Dataset.from_dict({"prompt": ["a", "b", "c"]}).to_iterable_dataset()
        >>> [row["prompt"] for row in islice(endless(rows, needed=2, seed=None), 5)]
        ['a', 'b', 'c', 'a', 'b']
    """
    rows = stream if seed is None else stream.shuffle(seed=seed)

    def passes() -> Iterator[dict[str, Any]]:
        for number in count():
            rows.set_epoch(number)
            seen = 0
            for seen, row in enumerate(rows, start=1):  # noqa: B007  # counted for the line below
                yield row
            if seen < needed:
                raise ValueError(
                    f"One rollout takes {needed} different prompts, but the stream `train_dataset` ended after {seen}."
                )

    return IterableDataset.from_generator(passes, features=stream.features)


def _check_columns(columns: Any, name: str, rules: PromptRules) -> None:
    if "prompt" not in columns:
        raise ValueError(f"The dataset needs a column 'prompt'; it has {list(columns)} (`{name}`).")
    for column, reward in rules.columns.items():
        if column not in columns:
            raise ValueError(
                f"The reward {reward!r} reads the column {column!r}, but `{name}` has {list(columns)}. Add it to the "
                "rows, with true or false for each prompt, or build the gate without it."
            )
    if rules.images is None and (found := image_columns(columns)):
        raise ValueError(
            f"`{name}` has the column {found[0]!r}, but prompts are read by a tokenizer, which sees no pictures. Give "
            "the model's processor as `processing_class` (`AutoProcessor.from_pretrained`), or remove the column."
        )
    if rules.for_rewards is not None and REWARD_PROMPT not in columns:
        raise ValueError(
            f"The dataset needs a column {REWARD_PROMPT!r}, because {rules.for_rewards}; it has {list(columns)} "
            f"(`{name}`). It holds what rewards read in place of the prompt: prompt and facts."
        )


def _check_chats(dataset: Any, name: str, rules: PromptRules) -> None:
    found = {row: problem for row in range(len(dataset)) if (problem := _chat_problem(dataset, row, rules))}
    fix = next(iter(found.values()), ("", ""))[1]
    _refuse({row: what for row, (what, way) in found.items() if way == fix}, name, len(dataset), fix)


def _chat_problem(rows: Any, index: int, rules: PromptRules) -> tuple[str, str] | None:
    """Say what is wrong with a prompt and its pictures, and how to put it right."""
    try:
        row = rows[index]
        if reason := _wrong_kind(row["prompt"]):
            return reason, "Remove such rows"
        ids, _ = rules.images.encode([chat_with_images(row)], **rules.template_kwargs)  # type: ignore[union-attr]
    except BadRow as problem:
        return str(problem), "Correct or remove such rows"
    except (OSError, SyntaxError) as error:  # of the data set's own decoding
        return f"has a picture that cannot be read ({type(error).__name__}: {error})", "Correct or remove such rows"
    return rules.problem(ids[0])


def _reward_problem(row: dict[str, Any], rules: PromptRules) -> str | None:
    """Say what is wrong with the reward prompt of a row, and how to put it right."""
    if problem := reward_prompt_problem(row):
        return problem
    if not rules.reward_prompts_fit:
        return None  # read by other models, which say themselves what does not fit
    try:
        chat = row[REWARD_PROMPT] if rules.images is None else chat_with_images({**row, "prompt": row[REWARD_PROMPT]})
        found = rules.problem(rules.encode([chat])[0])
    except BadRow as problem:
        found = str(problem), "Correct or remove such rows"
    return None if found is None else f"`{REWARD_PROMPT}` {found[0]}. {found[1]}"


def _check_all(prompts: list[Any], name: str, rules: PromptRules) -> None:
    kinds = {index: reason for index, prompt in enumerate(prompts) if (reason := _wrong_kind(prompt))}
    _refuse(kinds, name, len(prompts), "Remove such rows")
    problems = {row: problem for row, ids in enumerate(rules.encode(prompts)) if (problem := rules.problem(ids))}
    if problems:
        fix = next(iter(problems.values()))[1]
        _refuse({row: problem for row, (problem, way) in problems.items() if way == fix}, name, len(prompts), fix)


def _stream_check(name: str, rules: PromptRules) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    def check(row: dict[str, Any], index: int) -> dict[str, Any]:
        _check_columns(row, name, rules)
        reason = _wrong_kind(row["prompt"])
        problem = (reason, "Remove such rows") if reason else None
        if rules.images is not None:
            problem = _chat_problem([row], 0, rules)
        elif problem is None:
            problem = rules.problem(rules.encode([row["prompt"]])[0])
        if problem:
            raise ValueError(f"`{name}`: the prompt of row {index} {problem[0]}. {problem[1]}.")
        if REWARD_PROMPT in row and (found := _reward_problem(row, rules)):
            raise ValueError(f"`{name}`: row {index}: {found}.")
        return row

    return check


def _refuse(problems: dict[int, str], name: str, rows: int, fix: str) -> None:
    if problems:
        index, what = next(iter(problems.items()))
        raise ValueError(
            f"`{name}`: {len(problems)} of {rows} prompts cannot be used: the prompt of row {index} {what}. {fix}."
        )


def _wrong_kind(prompt: Any) -> str | None:
    for index, message in enumerate(prompt if isinstance(prompt, list) else ()):
        if isinstance(message, dict) and message.get("content", "") is None and not message.get("tool_calls"):
            return f"has a message without text (`content` of message {index} is null)"
    try:
        check_kind(prompt, "prompt")
    except BadRow:
        return "is neither text nor a chat (a list of messages with `role` and `content`)"
    return "is missing" if prompt is None else "has no message" if prompt == [] else None
