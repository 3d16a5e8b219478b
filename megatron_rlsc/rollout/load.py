"""What each replica still has to do, in tokens and in sequences: which of them is asked next, and when. No network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_rlsc.rollout.fleet import Replica


class ResponseLength:
    """Tokens to expect of a response: the mean of those that are done, the limit until there is one.

    It goes on from step to step: within one, short responses come first and would pull the mean down.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._tokens, self._responses = limit, 0, 0

    def add(self, length: int) -> None:
        """A response of `length` tokens is done."""
        self._tokens += length
        self._responses += 1

    @property
    def expected(self) -> float:
        """Tokens."""
        return self._tokens / self._responses if self._responses else float(self._limit)


@dataclass(eq=False, kw_only=True, slots=True)
class Load:
    """One replica's share of a step."""

    replica: Replica
    samples_per_prompt: int
    prompts: dict[int, int] = field(default_factory=dict)
    """{group: tokens of its prompt} of what it has been asked and has not answered."""
    generated: int = 0
    """Tokens that it has generated in this step, by its own count."""
    _unfinished_by_poll: int | None = None
    """Sequences that vLLM had, running and waiting, when it was asked last."""
    _sent: list[int] = field(default_factory=lambda: [0, 0])
    """Sequences sent before and after that, each since the poll before."""

    @property
    def sequences(self) -> int:
        """Asked for and not answered, as far as answers tell: a prompt's siblings are answered together."""
        return len(self.prompts) * self.samples_per_prompt

    @property
    def unfinished(self) -> int:
        """Of those, the ones that vLLM may still be at: siblings of a long response are done long before its answer.

        What was sent shortly before the last poll may not have reached the engine by then, so it counts on top.
        """
        if self._unfinished_by_poll is None:
            return self.sequences
        return min(self.sequences, self._unfinished_by_poll + sum(self._sent))

    def expected_tokens(self, response_length: float) -> float:
        """Of its unanswered prompts and their responses, of `response_length` tokens each."""
        return self.samples_per_prompt * (sum(self.prompts.values()) + len(self.prompts) * response_length)

    def send(self, group: int, prompt_length: int) -> None:
        """It is asked for a prompt of so many tokens."""
        self.prompts[group] = prompt_length
        self._sent[1] += self.samples_per_prompt

    def finish(self, group: int) -> None:
        """It has answered, or has been told to forget."""
        del self.prompts[group]

    def polled(self, unfinished: int) -> None:
        """vLLM says that it has `unfinished` sequences, running and waiting."""
        self._unfinished_by_poll = unfinished
        self._sent = [self._sent[1], 0]


def choose(loads: Sequence[Load], *, response_length: float, max_num_seqs: int) -> Load | None:
    """Whom to ask for the next prompt: of those with room, the one with the fewest tokens to go. None has: None.

    A replica has room while at most `max_num_seqs` sequences are unfinished there: so all that it can decode at one
    time is busy and one prompt waits behind it, and the rest wait here, for whichever replica is free first.
    """
    with_room = [load for load in loads if load.unfinished <= max_num_seqs]
    return min(with_room, key=lambda load: load.expected_tokens(response_length), default=None)
