"""Responses of a model by transformers' own generate: batches padded on the left, greedy or sampled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from transformers import GenerationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    max_response_length: int,
    stop_token_ids: tuple[int, ...],
    batch_size: int,
    seed: int,
    title: str,
) -> list[list[int]]:
    """A response to each prompt, up to and including its first stop token; without one where it was cut.

    Args:
        prompts: token ids of each.
        temperature: 0 is greedy; otherwise of an uncut softmax, as in training.
        seed: of the samples, which also depend on `batch_size`.
        title: of the progress bar.
    """
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    # In the model's place, or generate() fills what is not given from the folder's own top-k, top-p and penalties.
    model.generation_config = GenerationConfig(
        max_new_tokens=max_response_length,
        eos_token_id=list(stop_token_ids),
        pad_token_id=stop_token_ids[0],
        **sampling,
    )
    responses: list[list[int]] = [[] for _ in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # like lengths together: little padding
    with tqdm(total=len(prompts), desc=title, unit="problem", disable=not sys.stderr.isatty()) as progress:
        for first in range(0, len(prompts), batch_size):
            rows = longest_first[first : first + batch_size]
            width = len(prompts[rows[0]])
            padding = [width - len(prompts[i]) for i in rows]
            input_ids = [[stop_token_ids[0]] * pad + list(prompts[i]) for i, pad in zip(rows, padding)]
            mask = [[0] * pad + [1] * (width - pad) for pad in padding]  # generate() counts positions from its first 1
            output = model.generate(
                input_ids=torch.tensor(input_ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
            )
            for i, response in zip(rows, output[:, width:].tolist()):
                responses[i] = _until_stop(response, stop_token_ids)
            progress.update(len(rows))
    return responses


def _until_stop(response: list[int], stop_token_ids: tuple[int, ...]) -> list[int]:
    """Up to and including the first stop token: what follows is padding."""
    stops = [i for i, token in enumerate(response) if token in stop_token_ids]
    return response[: stops[0] + 1] if stops else response
