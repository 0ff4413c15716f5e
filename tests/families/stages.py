"""The stages of a tiny model of a family as users run them, and what transformers and PEFT alone say of it."""

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import ModelConfig, SFTConfig, SFTTrainer

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.models import load_causal_lm, load_sequence_classifier, lora_config
from rlhf_recipes.ppo._trl import tokenized_prompts
from rlhf_recipes.ppo.passes import sample_from
from rlhf_recipes.reward_modeling import PreferenceConfig, PreferenceTrainer
from tests.families.table import FAMILIES

_SHORT = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
_LORA = ModelConfig(lora_r=4, lora_dropout=0.0)
PROMPTS = [
    "the film",
    "a story was",
    "this actor felt very dull and slow so",
    "write",
    "the ending of it i liked but the",
    "so good",
    "music was not",
    "i hated a scene that was so very long",
]
PROMPTS = [" ".join(word for word in prompt.split() if word not in ("of", "long")) for prompt in PROMPTS]


def save_base(name, folder, tokenizer):
    """Save a random model of a family, in which gains and biases are not 1 and 0, so that a mistake with one shows."""
    family = FAMILIES[name]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.kind, **family.config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None  # those of the tokenizer
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train_sft(base, folder, tokenizer):
    """The SFT stage: the trained model, and the folder of its adapter."""
    model = load_causal_lm(base)
    rows = Dataset.from_list([{"prompt": prompt, "completion": " good and warm"} for prompt in PROMPTS])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(str(folder), per_device_train_batch_size=4, **_SHORT),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(_LORA, "CAUSAL_LM", model),
    )
    trainer.train()
    trainer.save_model(str(folder))
    return trainer.model.eval(), str(folder)


def train_reward(base, folder, tokenizer):
    """The reward stage: the trained classifier, and the folder of its adapter."""
    torch.manual_seed(3)
    model = load_sequence_classifier(base)
    rows = [{"prompt": prompt, "chosen": " good", "rejected": " was bad and cold"} for prompt in PROMPTS]
    trainer = PreferenceTrainer(
        model=model,
        args=PreferenceConfig(str(folder), per_device_train_batch_size=4, center_rewards_coefficient=None, **_SHORT),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(_LORA, "SEQ_CLS", model),
    )
    trainer.train()
    trainer.save_model(str(folder))
    return trainer.model.eval(), str(folder)


def make_ppo(model, folder, tokenizer, reward_funcs, **fields):
    """A PPO trainer of two steps."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 8}
    defaults = {"max_completion_length": 6, "num_iterations": 1, "logging_steps": 1, **sizes, **_SHORT}
    return PPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=PPOConfig(str(folder), **defaults | fields),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
    )


def plain_policy(base, adapter):
    """A policy as transformers and PEFT load it."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def plain_classifier(base, adapter):
    """A reward model or critic as transformers and PEFT load it."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.get_text_config().pad_token_id = None  # a random model may draw it, and read at its last token
    return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def plain_logps(model, prompt, completion, temperature=1.0):
    """Log-probabilities `(T,)` of one completion, of a single row without padding."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logps = (logits.float() / temperature).log_softmax(dim=-1)
    return logps.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


@torch.no_grad()
def plain_score(classifier, ids):
    """The score of one row without padding."""
    return classifier(input_ids=torch.tensor([ids])).logits[0, 0]


@torch.no_grad()
def plain_text(model, prompt, ends, length):
    """The likeliest tokens after a single row, computed anew for each of them: no cache, no padding."""
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def texts(trainer):
    """The tokens that a trainer samples after all prompts in one batch."""
    trainer.model.eval()
    return sample_from(trainer, trainer.model, tokenized_prompts(trainer, PROMPTS))
