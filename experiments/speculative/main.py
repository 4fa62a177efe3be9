"""Trains the models, measures the grid, prints the tables and the findings."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from decoding.drafter import Drafter
from decoding.model import for_decoding
from decoding.sample import Sampler
from experiments import corpora, decoding_models, report, resume
from experiments.speculative import drafters, drawing, measure, models, prompts, results
from experiments.speculative.config import Config
from experiments.speculative.drafters import Parts
from experiments.speculative.measure import Cell
from experiments.speculative.models import Models
from lm.attention import ring
from lm.training.metrics import ProgressLine

_DRAWN = ('lookup', 'dynamic', 'recursive')  # drafters whose trees are drawn; the last available
_ROUNDS = 8  # the round with the most accepted tokens among these is drawn


def main(config: Config, out: epath.Path, mesh: Mesh) -> dict[str, float]:
    """Runs the whole comparison, resuming from `out`; returns flat metrics."""
    begin = time.monotonic()
    with jax.set_mesh(mesh):
        ring.refuse('decoding')  # before anything is trained
    corpus = corpora.open_corpus(config.data, config.tfds)
    resume.claim_corpus(out, corpus)
    questions = prompts.read_questions(config.spec_bench) if config.spec_bench else None
    known = models.prepare(config, corpus, out, mesh)
    main_ratio = models.nearest(known, config.ratio)
    many, length = config.prompts, config.prompt_tokens
    if questions:
        texts = prompts.encode_questions(questions, known.target, many, length)
    else:
        texts = prompts.held_out(corpus.test, known.target, many, length)
    _check_length(config, known, texts)
    grid = measure.cells(config, list(known.drafts), main_ratio)
    # build all drafters before measuring, so that an invalid one fails early
    made = {cell: _drafter(config, known, cell) for cell in grid}
    target, rows = for_decoding(known.target.model), []
    with ProgressLine('measuring', len(grid)) as progress, jax.set_mesh(mesh):
        for i, cell in enumerate(grid):
            measured = functools.partial(measure.measure, config, cell, target, made[cell], texts)
            rows += resume.part_once(out / 'cells' / f'{cell.name}.json', measured)
            progress.update(i + 1, cell.name)
    _show(config, known, rows, out)
    results.plot(out, config, rows)
    with jax.set_mesh(mesh):
        _draw(config, known, made, next(iter(texts.values()))[0], out)
    Console().print(f'plots, bundles and result.json: {out}')
    seconds = {report.key('seconds', 'this_process'): time.monotonic() - begin}
    return {**results.flat(rows, main_ratio), **seconds}


def _check_length(config: Config, known: Models, texts: measure.Prompts) -> None:
    """Raises ValueError if the texts become longer than a model's number of positions."""
    longest = max(len(text) for rows in texts.values() for text in rows) + config.new_tokens
    for lm in (known.target.model, *known.drafts.values()):
        if longest > lm.model.max_length:
            raise ValueError(
                f'--prompt_tokens {config.prompt_tokens} --new_tokens {config.new_tokens}: '
                f'{longest} tokens, but a model has {lm.model.max_length} positions'
            )


def _drafter(config: Config, known: Models, cell: Cell) -> Drafter:
    parts = Parts(
        known.target.model, known.drafts[cell.ratio], config.exit_layers, known.adapter,
        config.longest,
    )  # fmt: skip
    if cell.kind == 'budget':
        return drafters.of_budget(cell.drafter, parts, cell.size)
    return drafters.of_length(cell.drafter, parts, cell.size, config.width)


def _show(config: Config, known: Models, rows: list[dict[str, Any]], out: epath.Path) -> None:
    """Prints the tables and the findings, and saves both as Markdown."""
    size = known.target.model.model.size
    smaller = ', '.join(f'1:{ratio}' for ratio in known.drafts)
    calls = sum(len(row['walks_by_depth']) > 0 for row in rows)
    notes = [
        *results.FOOTNOTES,
        f'target: {size / 1e6:.2f}M parameters; draft models: {smaller}. {calls} rows of '
        f'{config.prompts} prompts x {config.new_tokens} tokens x {config.repeats} repeats.',
    ]
    lines = []
    for title, body, columns in results.tables(rows, config.width):
        report.table(body, columns, title)
        lines += [f'### {title}', '', report.markdown_table(body, columns)]
    notes += results.claims(rows)
    console = Console(width=160)
    for note in notes:
        console.print(f'  {note}', markup=False, highlight=False)
    report.write_text_atomic(
        out / 'table.md', '\n'.join([*lines, *(f'- {note}' for note in notes)]) + '\n'
    )


def _draw(
    config: Config, known: Models, made: dict[Cell, Drafter], prompt: list[int], out: epath.Path
) -> None:
    """Saves a drawing of one round after a prompt, for the last drafter of `_DRAWN` in the grid."""
    trees = [cell for cell in made if cell.drafter in _DRAWN and cell.kind == 'budget']
    if not trees:
        return
    cell = max(trees, key=lambda cell: (_DRAWN.index(cell.drafter), cell.size))
    sampler = Sampler(temperature=jnp.float32(config.temperatures[-1]))
    draft = decoding_models.draft_sampler(sampler, made[cell], config.greedy_draft_temperature)
    one = drawing.best_round(
        known.target.model, drafters.with_sampler(made[cell], draft), sampler, prompt,
        jax.random.key(config.seed), config.new_tokens, _ROUNDS,
    )  # fmt: skip
    title = drafters.NAMES[cell.drafter]
    drawing.draw(out / 'tree.png', one, known.target.token_bytes(), title)
