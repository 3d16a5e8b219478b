"""(b) TRL's GRPOTrainer, given the same responses by a rollout function; its loss is replaced by RLSC's.

Everything else is TRL's: its dataloader, padding, log-probability head, accumulation and training loop. It runs in a
thread of its own, from one step's request to the next.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
from typing import Any

import torch
from torch import Tensor

from megatron_rlsc.types import Sample
from sides.hf import adamw, load
from sides.work import CLIP, Outcome, Setup

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # of rollout_func

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def build(setup: Setup) -> TrlGrpo:
    return TrlGrpo(setup)


class TrlGrpo:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = load(setup)
        self.optimizer = adamw(self.model, setup.lr)
        self.runs: dict[tuple[int, int], Run] = {}

    def step(self, samples: list[Sample], micro_batch: int) -> Outcome:
        size = len(samples), micro_batch
        if size not in self.runs:
            self.runs[size] = Run(self.setup, self.model, self.optimizer, size)
        return self.runs[size].step(samples)

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


class Run:
    """A trainer of so many responses, and of them in a micro-batch. It waits in its rollout function."""

    def __init__(
        self, setup: Setup, model: torch.nn.Module, optimizer: torch.optim.Optimizer, size: tuple[int, int]
    ) -> None:
        self.size = size
        self.requests: queue.Queue[list[Sample]] = queue.Queue()
        self.answers: queue.Queue[Outcome | None] = queue.Queue()
        self.loss, self.logprobs = 0.0, list[float]()
        responses, micro_batch = size
        self.folder = tempfile.TemporaryDirectory()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, unk_token="x")),
            pad_token="<pad>",
            eos_token="<eos>",
        )
        self.trainer = Rlsc(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(
                output_dir=self.folder.name,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=responses // micro_batch,
                num_generations=min(16, responses),
                max_steps=1_000_000,
                temperature=setup.temperature,
                beta=0.0,
                max_grad_norm=CLIP,
                bf16=False,
                gradient_checkpointing=False,  # with it, as by default, it is slower
                use_cpu=setup.device == "cpu",
                dataloader_pin_memory=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": "x"}] * responses),
            processing_class=tokenizer,
            rollout_func=self._roll_out,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
            callbacks=[Ends(self)],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.rlsc, self.trainer.alpha = self, setup.alpha
        threading.Thread(target=self._train, daemon=True).start()

    def step(self, samples: list[Sample]) -> Outcome:
        self.requests.put(samples)
        answer = self.answers.get()
        if answer is None:
            raise RuntimeError("TRL's trainer has ended; what it died of is above")
        return answer

    def _train(self) -> None:
        try:
            self.trainer.train()
        finally:
            self.answers.put(None)

    def _roll_out(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """A step's responses, in place of generated ones."""
        samples = self.requests.get()
        self.loss, self.logprobs = 0.0, []
        return {
            "prompt_ids": [list(sample.prompt_token_ids) for sample in samples],
            "completion_ids": [list(sample.response_token_ids) for sample in samples],
            "logprobs": [list(sample.rollout_logprobs) for sample in samples],
        }


class Rlsc(GRPOTrainer):
    """GRPOTrainer with RLSC's loss."""

    rlsc: Run
    alpha: float

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        per_token, _, _ = self._get_per_token_logps_and_entropies(
            model, tokens, mask, inputs["completion_ids"].shape[1], compute_entropy=True
        )
        log_p = (per_token * inputs["completion_mask"]).sum(1)
        loss = -((log_p.detach().exp() + self.alpha) * log_p).sum() / self.rlsc.size[0]
        self.rlsc.loss += loss.item()
        self.rlsc.logprobs += log_p.tolist()
        return loss


class Ends(TrainerCallback):
    """The end of a step, where the trainer has its gradient's norm to log."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "grad_norm" in logs:
            self.run.answers.put(
                Outcome(loss=self.run.loss, gradient_norm=logs["grad_norm"], logprobs=sorted(self.run.logprobs))
            )
