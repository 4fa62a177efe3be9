"""Converts config.json of Hugging Face checkpoints to and from `lm.model.config.Config`.

Reading reports every problem at once. Writing for a family succeeds only if reading the result back
gives a model that computes the same function.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lm.files.json_fields import Fields, short
from lm.huggingface.families import ACTIVATIONS, FAMILIES, SIZES, Family
from lm.model import rope
from lm.model.config import Config, RopeScaling

MULTIMODAL = 'gemma3'  # its `text_config` is a gemma3_text
MOST_LAYERS = 10_000
_LAYER_TYPES = {'full_attention': False, 'sliding_attention': True}
# Unsupported features: the value in config.json, beside null, that turns each of them off.
_NEUTRAL: dict[str, Any] = {
    'attention_bias': False, 'mlp_bias': False, 'use_bidirectional_attention': False,
    'partial_rotary_factor': 1.0, 'is_encoder_decoder': False, 'add_cross_attention': False,
    'quantization_config': None, 'num_experts': None, 'num_local_experts': None,
}  # fmt: skip
_ROPE_FIELDS = {
    'rope_type', 'type', 'rope_theta', 'factor', 'low_freq_factor', 'high_freq_factor',
    'original_max_position_embeddings', 'partial_rotary_factor',
}  # fmt: skip
# Fields of `Config` that affect only initialisation or execution, and those that `_behaviour`
# compares in another form.
_NOT_COMPARED = {
    'dtype', 'param_dtype', 'remat', 'unroll', 'rope_theta', 'local_rope_theta', 'rope_scaling',
    'attention_scale', 'window', 'window_pattern', 'induction_init', 'ring',
}  # fmt: skip


def read(described: Mapping[str, Any], dtype: str) -> tuple[Family, Config]:
    """Returns the family and the config that config.json describes.

    Args:
      described: the parsed config.json.
      dtype: dtype of parameters and activations.

    Raises:
      ValueError: names every field that is missing, invalid or unsupported.
    """
    family, fields = _family(described)
    _derive(fields)
    for name, neutral in _NEUTRAL.items():
        if fields.values.get(name) not in (None, neutral):
            fields.problems.append(f'{name}: {short(fields.values[name])}; not supported')
    if 'AutoModelForCausalLM' in fields.part('auto_map'):
        fields.problems.append('auto_map: the model needs custom code; not supported')
    config: dict[str, Any] = dict(family.same)
    config |= {field: fields.count(name) for name, field in SIZES.items()}
    if config['n_layers'] > MOST_LAYERS:
        fields.refuse('num_hidden_layers', f'{MOST_LAYERS:,} at most')
    config['norm_epsilon'] = fields.number('rms_norm_eps')
    config['tied'] = fields.flag('tie_word_embeddings')
    config['activation'] = fields.one_of(family.activation, ACTIVATIONS)
    if family.scalar:
        config['attention_scale'] = fields.number('query_pre_attn_scalar') ** -0.5
    for name in ('final_logit_softcapping', 'attn_logit_softcapping'):
        if fields.given(name) and name in dict(family.softcaps):
            config[dict(family.softcaps)[name]] = fields.number(name)
        elif fields.given(name):
            fields.refuse(name, 'null in this family')
    config |= _rope(fields, family)
    if not fields.problems:
        config |= _windows(fields, family, config['n_layers'])
    if fields.problems:
        raise ValueError('; '.join(fields.problems))
    return family, Config(**config, dtype=dtype, param_dtype=dtype)


def _family(described: Mapping[str, Any]) -> tuple[Family, Fields]:
    """Returns the family and the text model's fields, with defaults filled in."""
    fields = dict(described)
    kind = fields.get('model_type')
    if kind == MULTIMODAL:
        text = fields.get('text_config')
        if not isinstance(text, dict) or text.get('model_type', 'gemma3_text') != 'gemma3_text':
            raise ValueError('text_config: expected the config of a gemma3_text')
        outside = ('tie_word_embeddings', 'quantization_config', 'auto_map')
        fields = {name: fields[name] for name in outside if name in fields} | text
        kind = 'gemma3_text'
    for family in FAMILIES:
        if family.model_type == kind:
            return family, Fields(family.defaults | fields)
    known = ', '.join([*(family.model_type for family in FAMILIES), MULTIMODAL])
    raise ValueError(f'model_type: {short(kind)}; expected one of {known}')


def _derive(fields: Fields) -> None:
    """Fills in the fields whose defaults depend on the number of heads."""
    heads, width = (fields.values.get(x) for x in ('num_attention_heads', 'hidden_size'))
    if not fields.given('num_key_value_heads'):
        fields.values['num_key_value_heads'] = heads
    if not fields.given('head_dim') and type(width) is type(heads) is int and heads > 0:
        fields.values['head_dim'] = width // heads


def _rope(fields: Fields, family: Family) -> dict[str, Any]:
    """Reads either spelling: `rope_parameters`, or `rope_theta` with `rope_scaling`."""
    new, old = fields.part('rope_parameters'), fields.part('rope_scaling')
    if new and old:
        fields.refuse('rope_scaling', 'null beside rope_parameters')
    by_layer = Fields(new, fields.problems)
    if family.local_rope:
        if not new.keys() <= _LAYER_TYPES.keys():
            fields.refuse('rope_parameters', 'full_attention and sliding_attention')
        new = by_layer.part('full_attention')
    length = fields.values.get('max_position_embeddings')
    rope = {'rope_theta': fields.values['rope_theta']} | new | old
    theta, scaling = _frequencies(Fields(rope, fields.problems), length)
    if not family.local_rope:
        return {'rope_theta': theta, 'rope_scaling': scaling}
    local = {'rope_theta': fields.values['rope_local_base_freq']}
    local |= by_layer.part('sliding_attention')
    local_theta, local_scaling = _frequencies(Fields(local, fields.problems), length)
    if local_scaling is not None:
        fields.refuse('rope_parameters', 'no scaling of sliding_attention')
    return {'rope_theta': theta, 'rope_scaling': scaling, 'local_rope_theta': local_theta}


def _frequencies(rope: Fields, max_length: Any) -> tuple[float, RopeScaling | None]:
    for name in sorted(rope.values.keys() - _ROPE_FIELDS):
        if rope.given(name):
            rope.refuse(name, 'null (unknown field of RoPE)')
    if rope.values.get('partial_rotary_factor') not in (None, 1.0):
        rope.refuse('partial_rotary_factor', '1')
    theta = rope.number('rope_theta', least=1.0)
    kind = rope.values.get('rope_type') or rope.values.get('type') or 'default'
    if kind == 'default':
        return theta, None
    if kind not in ('linear', 'llama3'):
        rope.problems.append(f'RoPE scaling: {short(kind)}; expected default, linear or llama3')
        return theta, None
    factor = rope.number('factor', least=1.0)
    if kind == 'linear':
        return theta, RopeScaling('linear', factor)
    low, high = rope.number('low_freq_factor'), rope.number('high_freq_factor')
    if low >= high:
        rope.refuse('low_freq_factor', f'less than high_freq_factor = {high:g}')
    rope.values.setdefault('original_max_position_embeddings', max_length)
    length = rope.count('original_max_position_embeddings')
    return theta, RopeScaling('llama3', factor, low, high, length)


def _windows(fields: Fields, family: Family, n: int) -> dict[str, Any]:
    for name, least in (('sliding_window_pattern', 1), ('max_window_layers', 0)):
        if name in family.defaults:
            fields.count(name, least)
    switch = 'use_sliding_window' not in family.defaults or fields.flag('use_sliding_window')
    window = None
    if switch and fields.given('sliding_window'):
        window = fields.count('sliding_window')
    kinds = fields.values.get('layer_types')
    if kinds is not None and not family.lists_layers:
        fields.refuse('layer_types', 'null in this family')
    elif kinds is not None and not (isinstance(kinds, list) and _fit(kinds, n)):
        fields.refuse('layer_types', f'a list of {n}: each {" or ".join(_LAYER_TYPES)}')
    if fields.problems:
        return {}
    windowed = family.windowed(fields.values, n)
    if kinds is not None:
        windowed = [_LAYER_TYPES[kind] for kind in kinds]
    if not any(windowed):
        return {}
    if window is None:
        fields.refuse('sliding_window', 'a window, for layers of sliding_attention')
    return {'window': window, 'window_pattern': _shortest_pattern(windowed)}


def _fit(kinds: list[Any], n: int) -> bool:
    return len(kinds) == n and all(isinstance(k, str) and k in _LAYER_TYPES for k in kinds)


def _shortest_pattern(flags: list[bool]) -> tuple[bool, ...]:
    """Returns the shortest pattern whose repetition gives the flags."""
    size = next(p for p in range(1, len(flags) + 1) if flags[p:] == flags[: len(flags) - p])
    return tuple(flags[:size])


def write(config: Config, family: Family) -> dict[str, Any]:
    """Returns the contents of config.json for a model of this family.

    Raises:
      ValueError: the family cannot represent the model; names the properties that it lacks.
    """
    described = _described(config, family)
    try:
        again = read(described, config.dtype)[1]
    except ValueError as error:
        raise ValueError(f'{family.model_type}: {error}') from None
    want, have = _behaviour(config), _behaviour(again)
    different = sorted(name for name in want if want[name] != have[name])
    if family.divides and config.d_model % config.n_heads:
        different.append('d_model that is not a multiple of n_heads')
    if different:
        raise ValueError(f'{family.model_type} models cannot represent {", ".join(different)}')
    return described


def find(config: Config) -> Family:
    """Returns the first family that can represent the model.

    Raises:
      ValueError: none can; names for each family the properties that it lacks.
    """
    problems = []
    for family in FAMILIES:
        try:
            write(config, family)
        except ValueError as error:
            problems.append(str(error))
        else:
            return family
    raise ValueError('; '.join(problems))


def _described(config: Config, family: Family) -> dict[str, Any]:
    spelling = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    described: dict[str, Any] = {
        'architectures': [family.architecture],
        'model_type': family.model_type,
        **{name: getattr(config, field) for name, field in SIZES.items()},
        **{name: getattr(config, field) for name, field in family.softcaps},
        family.activation: spelling[config.activation],
        'rms_norm_eps': config.norm_epsilon,
        'tie_word_embeddings': config.tied,
        'rope_theta': config.rope_theta,  # older spelling; any transformers reads it
        'rope_scaling': _scaling(config.rope_scaling),
        'sliding_window': config.window,
        'torch_dtype': config.param_dtype,
    }
    if family.local_rope:
        described['rope_local_base_freq'] = config.local_rope_theta or config.rope_theta
    if family.scalar:
        described['query_pre_attn_scalar'] = round(config.query_scale**-2)
    windowed = config.windowed_layers
    if family.lists_layers:
        names = {windowed: name for name, windowed in _LAYER_TYPES.items()}
        described['layer_types'] = [names[w] for w in windowed]
        # has to be a number even if no layer uses it
        described['sliding_window'] = config.window or config.max_length
    if 'use_sliding_window' in family.defaults:
        described['use_sliding_window'] = any(windowed)
        described['max_window_layers'] = [*windowed, True].index(True)
    return described


def _scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    described = {'rope_type': scaling.kind, 'factor': scaling.factor}
    if scaling.kind == 'linear':
        return described
    return described | {
        'low_freq_factor': scaling.low_frequency_factor,
        'high_freq_factor': scaling.high_frequency_factor,
        'original_max_position_embeddings': scaling.original_length,
    }


def _behaviour(config: Config) -> dict[str, Any]:
    """Returns the model's function in a canonical form, independent of the config's spelling."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in _NOT_COMPARED} | {
        'attention scale': config.query_scale,
        'windows': [config.window if windowed else None for windowed in config.windowed_layers],
        'rotary frequencies': rope.frequencies(config).tolist(),
    }
