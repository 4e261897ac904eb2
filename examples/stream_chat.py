"""Streams a chat completion from a server that `flashmla serve` (or `make serve`) started.

python examples/stream_chat.py [--url http://127.0.0.1:8000] [QUESTION]
"""

from __future__ import annotations

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a running server one question.")
    parser.add_argument("question", nargs="?", default="How are you?")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()

    client = OpenAI(base_url=f"{arguments.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": arguments.question}],
        max_tokens=arguments.max_tokens,
        stream=True,
    )
    for chunk in answer:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
