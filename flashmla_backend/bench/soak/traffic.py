"""The requests of a soak, and what their answers must be."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashmla_backend.bench.vllm_server import MODEL_NAME
from flashmla_backend.tokenizer import SPECIAL_TOKENS, WORDS, vocabulary

if TYPE_CHECKING:
    from aiohttp import ClientSession

# Of twenty requests.
KINDS = {"ragged": 6, "repeating": 4, "prefix": 4, "streamed": 3, "cancelled": 3}
KEPT_ERRORS = 20
FIRST_TEXT_TOKEN = len(SPECIAL_TOKENS)
TEXT_TOKENS = range(FIRST_TEXT_TOKEN, len(vocabulary()[0]))


def deal() -> Iterator[str]:
    """Kinds without end, in a shuffled order in which each has its share of every twenty."""
    deck = [kind for kind, share in KINDS.items() for _ in range(share)]
    random.Random(0).shuffle(deck)
    return itertools.cycle(deck)


class WrongAnswer(Exception):
    """The server answered, and not what was asked for."""


@dataclass
class Tally:
    """What happened so far."""

    answered: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    errors: list[str] = field(default_factory=list)  # the first of them
    tokens: int = 0  # generated, of answers that were read to their end

    def fail(self, what: str) -> None:
        self.failed += 1
        if len(self.errors) < KEPT_ERRORS:
            self.errors.append(what)


class Client:
    """One of several that each ask one request after the other.

    kinds: what to ask next, dealt to all clients. longest: tokens of prompt and answer together.
    seed: clients with different seeds ask different requests.
    """

    def __init__(self, session: ClientSession, url: str, kinds: Iterator[str], longest: int, seed: int):
        self.session, self.url, self.kinds, self.longest = session, url, kinds, longest
        self.random = random.Random(seed)
        shared = random.Random(0)  # all clients share these
        self.prefixes = [shared.choices(TEXT_TOKENS, k=longest // 4 + 17 * number) for number in range(3)]

    async def ask(self, tally: Tally) -> None:
        """What comes next, counted."""
        kind = next(self.kinds)
        try:
            tokens = await getattr(self, kind)()  # apart: others add to the tally meanwhile
            tally.tokens += tokens
            tally.answered[kind] += 1
        except Exception as error:  # whatever it was, it is what a soak looks for
            tally.fail(f"{kind}: {type(error).__name__}: {error}")

    async def ragged(self) -> int:
        length = int(math.exp(self.random.uniform(0, math.log(self.longest * 3 // 4))))
        return await self._complete(self.random.choices(TEXT_TOKENS, k=length))

    async def repeating(self) -> int:
        phrase = self.random.choices(TEXT_TOKENS, k=self.random.randint(2, 9))
        return await self._complete((phrase * self.longest)[: self.random.randint(10, self.longest // 3)])

    async def prefix(self) -> int:
        prefix = self.random.choice(self.prefixes)
        tails = [self.random.choices(TEXT_TOKENS, k=self.random.randint(1, self.longest // 8)) for _ in range(2)]
        # At once: the second finds the pages of the first before others can need them.
        return sum(await asyncio.gather(*(self._complete(prefix + tail) for tail in tails)))

    async def streamed(self) -> int:
        return await self._stream(leave_after=None)

    async def cancelled(self) -> int:
        return await self._stream(leave_after=self.random.randint(0, 8))

    async def _complete(self, prompt: list[int]) -> int:
        wanted = self.random.randint(1, self.longest // 5)
        answer = await complete(self.session, self.url, {"prompt": prompt, "max_tokens": wanted, "logprobs": 1})
        (choice,) = answer["choices"]
        if not all(map(math.isfinite, choice["logprobs"]["token_logprobs"])):
            raise WrongAnswer("a log probability is not finite")
        _check_length(answer["usage"], wanted)
        return wanted

    async def _stream(self, leave_after: int | None) -> int:
        wanted = self.random.randint(10, self.longest // 5)
        words = " ".join(self.random.choices(WORDS.split(), k=self.random.randint(1, self.longest // 8)))
        body = {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": words}],
            "max_tokens": wanted,
            "ignore_eos": True,
            "temperature": self.random.choice([0, 1]),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        usage, events = None, 0
        async with self.session.post(f"{self.url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise WrongAnswer(f"status {response.status}: {await response.text()}")
            async for line in response.content:
                if events == leave_after:
                    response.close()  # the server sees that the client is gone
                    return 0
                if line.startswith(b"data: {"):
                    event, events = json.loads(line.removeprefix(b"data: ")), events + 1
                    if "error" in event:
                        raise WrongAnswer(str(event["error"]))
                    usage = event.get("usage") or usage
        _check_length(usage, wanted)
        return wanted


async def complete(session: ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """A greedy completion that does not end early."""
    body = {"model": MODEL_NAME, "temperature": 0, "ignore_eos": True, **body}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise WrongAnswer(f"status {response.status}: {await response.text()}")
        answer: dict[str, Any] = await response.json()
        return answer


def _check_length(usage: dict[str, Any] | None, wanted: int) -> None:
    found = usage and usage["completion_tokens"]
    if found != wanted:
        raise WrongAnswer(f"{found} tokens instead of {wanted}")
