"""Makes the two models beside it and what SentencePiece itself says of some texts.

    pip install sentencepiece && python tests/tokenization/huggingface/sentencepiece/make.py

The tests need neither: they read `bpe.model`, `unigram.model` and `expected.json`.
"""

import json
import os
import pathlib

import sentencepiece

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[3]
TEXTS = [
    'Hello world',
    ' two  spaces   and    more ',
    'def main():\tpass',
    'naïve façade, Ελληνικά και русский',
    '😀 is in no piece, nor is 漢字',
    'x<tab>y<tab><tab>',
    '<s> and <0x41> are text',
    '1234567890 !?#%',
    '',
]


def main() -> None:
    """Writes all three files."""
    os.chdir(HERE)  # a model holds the names of its files
    lines = [
        line for f in ('README.md', 'docs/models.md') for line in (ROOT / f).open() if line.strip()
    ]
    lines += ['Ελληνικά και άλλα', 'русский и другие', 'naïve façade'] * 20
    (HERE / 'lines.txt').write_text(''.join(line.strip() + '\n' for line in lines))
    expected = {}
    for kind in ('bpe', 'unigram'):
        sentencepiece.SentencePieceTrainer.train(
            input='lines.txt', model_prefix=kind, model_type=kind,
            vocab_size=500, byte_fallback=kind == 'bpe', normalization_rule_name='identity',
            remove_extra_whitespaces=False, user_defined_symbols=['<tab>'], minloglevel=2,
            hard_vocab_limit=False,
        )  # fmt: skip
        model = sentencepiece.SentencePieceProcessor(model_file=str(HERE / f'{kind}.model'))
        expected[kind] = [model.encode(text) for text in TEXTS]
    (HERE / 'expected.json').write_text(
        json.dumps({'texts': TEXTS, **expected}, ensure_ascii=False) + '\n'
    )
    for name in ('lines.txt', 'bpe.vocab', 'unigram.vocab'):
        (HERE / name).unlink()


if __name__ == '__main__':
    main()
