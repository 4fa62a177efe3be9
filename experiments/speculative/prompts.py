"""Prompts: the beginnings of held-out documents, or the questions of Spec-Bench."""

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from experiments.decoding_models import Loaded
from lm.files import json_fields

# Xia et al. 2024, "Unlocking Efficiency in Large Language Model Inference: A Comprehensive Survey
# of Speculative Decoding", section 6: six tasks; MT-Bench's questions come in eight categories.
MT_BENCH = (
    'writing', 'roleplay', 'reasoning', 'math', 'coding', 'extraction', 'stem', 'humanities'
)  # fmt: skip
TASKS = ('mt_bench', 'translation', 'summarization', 'qa', 'math_reasoning', 'rag')
HELD_OUT = 'held_out'


def held_out(
    documents: Sequence[bytes], model: Loaded, count: int, tokens: int
) -> dict[str, list[list[int]]]:
    """Returns the first `tokens` tokens, including BOS, of `count` documents, as one task.

    Raises:
      ValueError: fewer than `count` documents are long enough.
    """
    prompts: list[list[int]] = []
    for i in np.random.default_rng(0).permutation(len(documents)):
        ids = model.encode(documents[int(i)])[:tokens]
        if len(ids) == tokens:
            prompts.append(ids)
        if len(prompts) == count:
            return {HELD_OUT: prompts}
    raise ValueError(
        f'held-out text: only {len(prompts)} documents have {tokens} tokens, expected {count}; '
        'lower --prompts or --prompt_tokens, or give more text'
    )


def read_questions(file: epath.PathLike) -> dict[str, list[bytes]]:
    """Returns the first turns of Spec-Bench's questions, by task.

    Args:
      file: `question.jsonl`, one question per line, with `category` and `turns`.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line is not a question of the benchmark; the message names it.
    """
    questions: dict[str, list[bytes]] = {task: [] for task in TASKS}
    for number, line in enumerate(epath.Path(file).read_bytes().splitlines(), 1):
        if line.strip():
            task, text = _question(f'{file}, line {number}', line)
            questions[task].append(text)
    if not any(questions.values()):
        raise ValueError(f'{file}: no questions')
    return {task: texts for task, texts in questions.items() if texts}


def encode_questions(
    questions: Mapping[str, Sequence[bytes]], model: Loaded, count: int, tokens: int
) -> dict[str, list[list[int]]]:
    """Encodes questions once, unchanged: without a chat template.

    Metrics then count the sampled tokens; the benchmark's own script re-encodes the baseline's
    text, which gives another number of tokens.

    Args:
      questions: questions by task.
      model: the model whose tokenizer and BOS are used.
      count: number of questions per task, spread evenly over it; all, if there are fewer.
      tokens: maximal tokens per prompt; of longer ones, BOS and the last tokens are kept.
    """
    bos = [] if model.model.bos is None else [model.model.bos]
    result = {}
    for task, texts in questions.items():
        chosen = np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(int)
        ids = [model.tokenizer.encode(texts[i]).tolist() for i in chosen]
        result[task] = [bos + row[-(tokens - len(bos)) :] for row in ids]
    return result


def _question(place: str, line: bytes) -> tuple[str, bytes]:
    try:
        question = json_fields.parse(line, place)
        category, text = question['category'], question['turns'][0]
    except (ValueError, KeyError, TypeError, IndexError):
        raise ValueError(f'{place}: expected JSON with "category" and "turns"') from None
    task = 'mt_bench' if category in MT_BENCH else category
    if task not in TASKS:
        raise ValueError(
            f'{place}: category {category!r}; expected one of {", ".join(TASKS[1:] + MT_BENCH)}'
        )
    if not isinstance(text, str) or not text:
        raise ValueError(f'{place}: the first of "turns" is empty or not text')
    try:
        return task, text.encode()
    except UnicodeEncodeError:
        raise ValueError(f'{place}: the first of "turns" has a lone surrogate') from None
