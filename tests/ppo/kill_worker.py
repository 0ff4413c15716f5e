"""Run by `test_resume.py` in processes that are killed: a training that saves after every step and resumes."""

import os

from datasets import Dataset
from transformers import TrainerCallback

from rlhf_recipes import PPOTrainer
from rlhf_recipes.checkpoints import check_output_dir
from tests.ppo.support import worker_config

TEXTS = [f"{subject} {verdict}" for subject in ("the film", "a story") for verdict in ("was", "felt", "is so", "not")]
STEPS = 60


class Journal(TrainerCallback):
    """Write down what happened, at once and outside of the run's folder, as somebody who watches it."""

    def __init__(self, path):
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def on_step_end(self, args, state, control, **kwargs):
        os.write(self._file, f"stepped {state.global_step}\n".encode())

    def on_save(self, args, state, control, **kwargs):
        os.write(self._file, f"saved {state.global_step}\n".encode())


def config(folder, resume):
    return worker_config(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=2,
        max_steps=STEPS,
        kl_controller="adaptive",
        kl_target=0.01,
        kl_horizon=16,
        score_scaling="running",
        ema_decay=0.9,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        resume_from_checkpoint=resume,
        logging_steps=1,
    )


def train(folder, journal, sft_adapter, reward_adapter, resume):
    args = config(folder, resume)
    checkpoint = check_output_dir(args)
    trainer = PPOTrainer(
        model=sft_adapter,
        reward_funcs=reward_adapter,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": text} for text in TEXTS]),
        callbacks=[Journal(journal)],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(os.path.join(folder, "final"))
