"""How modules and rooms depend on one another, and what only few of them may know."""

import ast
import graphlib
import re

from tests.test_contracts import SOURCES

LIBRARY = {name: text for name, text in SOURCES.items() if not name.startswith('experiments/')}


def module_of(name: str) -> str:
    """The module that a file is: lm.data for lm/data/__init__.py."""
    return re.sub(r'(/__init__)?\.py$', '', name).replace('/', '.')


def in_circle(graph: dict[str, set[str]]) -> list[str]:
    """Returns nodes of a graph that lead back to the first of them, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def circle(texts: dict[str, str]) -> list[str]:
    """Returns modules that import one another as they load: some cannot be imported first."""
    known = {module_of(name): text for name, text in texts.items()}
    graph: dict[str, set[str]] = {}
    for module, text in known.items():
        found = graph.setdefault(module, set())
        for node in ast.parse(text).body:  # what functions import comes later
            if isinstance(node, ast.ImportFrom):
                inner = {f'{node.module}.{alias.name}' for alias in node.names} & known.keys()
                found |= inner or {node.module or ''}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    return in_circle(graph)


def room_of(name: str) -> str:
    """A file's folder; a file that lies directly in a top folder is a room of its own."""
    folder, _, file = name.rpartition('/')
    return module_of(name if '/' not in folder and file != '__init__.py' else folder + '.py')


def rooms_in_circle(texts: dict[str, str]) -> list[str]:
    """Returns rooms of which each imports the next, at any time, and the last is the first."""
    rooms = {module_of(name): room_of(name) for name in texts}
    graph: dict[str, set[str]] = {}
    for name, text in texts.items():
        found = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                inner = {f'{node.module}.{alias.name}' for alias in node.names}
                # `from lm.data import shards, A` imports lm.data.shards, and A from lm.data.
                found |= inner & rooms.keys()
                found |= {node.module or ''} if inner - rooms.keys() else set()
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph.setdefault(room_of(name), set()).update(rooms[m] for m in found & rooms.keys())
    return in_circle({room: others - {room} for room, others in graph.items()})


def test_every_module_can_be_the_first_to_be_imported():
    assert not circle(SOURCES)
    a, b = {'lm/a.py': 'from lm.b import B'}, {'lm/b.py': 'import jax\nfrom lm import a'}
    assert set(circle(a | b)) == {'lm.a', 'lm.b'}
    assert not circle(a | {'lm/b.py': 'def f():\n    from lm import a'})


def test_rooms_form_no_circle():
    assert not rooms_in_circle(SOURCES)
    a = {'lm/a/x.py': 'from lm.b import y'}
    assert set(rooms_in_circle(a | {'lm/b/y.py': 'def f():\n    import lm.a.z', 'lm/a/z.py': ''}))
    assert set(rooms_in_circle({'lm/x.py': 'import lm.a.y', 'lm/a/y.py': 'from lm.x import f'}))
    assert set(rooms_in_circle({'lm/a/x.py': 'import lm.a.b.y', 'lm/a/b/y.py': 'import lm.a.x'}))
    # A room's files may know one another, and two rooms the third.
    assert not rooms_in_circle(a | {'lm/b/y.py': 'import lm.b.z', 'lm/b/z.py': 'from lm import c'})
    assert not rooms_in_circle(a | {'lm/b/y.py': 'import lm.c', 'lm/c.py': '', 'lm/d.py': ''})


def test_the_loop_knows_a_model_by_its_contract_alone():
    nodes = ast.walk(ast.parse(SOURCES['decoding/rounds.py']))
    imported = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    names = {f'{n.module}.{alias.name}' for n in imported for alias in n.names}
    of_lm = {name for name in names if name.split('.')[0] == 'lm'}
    contract = {name for name in of_lm if name.startswith('lm.model.contract')}
    assert of_lm - contract == {'lm.kernels.mask.pack_bits'}


def test_few_files_name_one_kind_of_tables():
    naming = {name for name, text in LIBRARY.items() if 'lexinvarian' in text.lower()}
    assert len(naming - {'lm/model/lexinvariant.py'}) <= 3, naming


def test_tables_and_body_are_composed_in_one_place():
    composing = re.compile(r'\btables\.(embed|unembed)\(')
    assert {n for n, text in LIBRARY.items() if composing.search(text)} == {
        'lm/model/transformer.py'
    }
