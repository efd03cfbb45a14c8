"""Who writes completions: transformers, vLLM, or an OpenAI-compatible endpoint.

Hides the three engines behind one function: prompts and seeds in, texts out, in order. Sampling is
SEAL's: temperature 1, top-p .95. A server that is down, slow or busy is asked a bounded number of
times, then CompletionError says what it answered; it never becomes an empty text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from skillvec.recipes.squad.texts import prompt_for

Writer = Callable[[Sequence[str], Sequence[int]], list[str]]


class CompletionError(RuntimeError):
    """No completion could be had: unreachable, refused, too slow, or empty each time."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; `chat` sends the prompt as a user's message."""

    temperature: float = 1.0
    top_p: float = 0.95
    max_new_tokens: int = 2048
    chat: bool = False


def transformers_writer(name: str, sampling: Sampling) -> Writer:
    """Load a model, on the GPU if there is one, and generate in batches."""
    import torch

    from skillvec.recipes.evaluate import load_model

    model, tokenizer = load_model(name)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    @torch.inference_mode()
    def write(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        shown = [_rendered(tokenizer, prompt, sampling) for prompt in prompts]
        # a chat template has written the special tokens already
        encoded = tokenizer(
            shown, return_tensors="pt", padding=True, add_special_tokens=not sampling.chat
        )
        ids = encoded["input_ids"].to(model.device)
        torch.manual_seed(seeds[0])  # one stream for the batch
        out = model.generate(
            input_ids=ids, attention_mask=encoded["attention_mask"].to(model.device),
            max_new_tokens=sampling.max_new_tokens, do_sample=True, top_k=0,
            temperature=sampling.temperature, top_p=sampling.top_p,
            repetition_penalty=1.0,  # or the model's own would be taken
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)

    return write


def vllm_writer(name: str, sampling: Sampling) -> Writer:
    """Load a model into vLLM; ValueError where vLLM is not installed."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise ValueError("--engine vllm: vLLM is not installed; pip install vllm") from None
    engine = LLM(name)
    tokenizer = engine.get_tokenizer()

    def write(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        drawn = [
            SamplingParams(
                temperature=sampling.temperature, top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens, seed=seed,
            )
            for seed in seeds
        ]  # fmt: skip
        shown = [_rendered(tokenizer, prompt, sampling) for prompt in prompts]
        return [done.outputs[0].text for done in engine.generate(shown, drawn)]

    return write


def endpoint_writer(
    url: str, name: str, sampling: Sampling, timeout: float = 600.0, retries: int = 4
) -> Writer:
    """Ask an endpoint such as http://localhost:8000/v1, all prompts of a call at once.

    `timeout` is in seconds, for one try; the key is OPENAI_API_KEY, where the server wants one.
    """
    import openai

    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url: expected http:// or https://, found {url!r}")
    client = openai.OpenAI(
        base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none",
        timeout=timeout, max_retries=retries,
    )  # fmt: skip
    drawn: dict[str, Any] = {"model": name, "temperature": sampling.temperature,
                             "top_p": sampling.top_p}  # fmt: skip

    def ask(prompt: str, seed: int) -> str:
        try:
            if sampling.chat:
                said = client.chat.completions.create(
                    messages=prompt_for(prompt, chat=True), seed=seed, **drawn,
                    max_completion_tokens=sampling.max_new_tokens,
                )  # fmt: skip
                return said.choices[0].message.content or ""
            found = client.completions.create(
                prompt=prompt, seed=seed, max_tokens=sampling.max_new_tokens, **drawn
            )
            return found.choices[0].text or ""
        except openai.OpenAIError as error:
            raise CompletionError(
                f"{name} at {url}: {error}; up to {1 + retries} tries of {timeout:g} s. "
                "Is the server running, does it serve this model, does the URL end in /v1?"
            ) from error
        except (AttributeError, IndexError, TypeError) as error:
            raise CompletionError(
                f"{name} at {url}: expected a completion, found something else ({error}); "
                "does the URL end in /v1?"
            ) from error

    def write(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        with ThreadPoolExecutor(max(1, len(prompts))) as pool:
            return list(pool.map(ask, prompts, seeds))

    return write


def _rendered(tokenizer: Any, prompt: str, sampling: Sampling) -> str:
    if not sampling.chat:
        return prompt
    return tokenizer.apply_chat_template(
        prompt_for(prompt, chat=True), tokenize=False, add_generation_prompt=True
    )
