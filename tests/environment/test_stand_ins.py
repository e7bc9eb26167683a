"""What the program does not import: each row of the table is true of its upstream, and nothing is ever wrong, only
later."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import textwrap
import threading
import types

import pytest
import two_layers

from gqa_export import cli
from gqa_export.environment import deferred_module, stand_in_rows, stand_ins
from gqa_export.environment.deferred_imports import Finder, install
from gqa_export.environment.deferred_module import Deferred, Later, run
from gqa_export.environment.stand_in_rows import DISABLED, LATER, NATIVE, REPLAYED, Change, StandIn
from gqa_export.environment.stand_ins import TABLE

checkpoint = two_layers.checkpoint
STAND_INS = [row for row in TABLE if isinstance(row, StandIn)]
APPLY = [row for row in STAND_INS if row.applies()]


@pytest.mark.parametrize("row", APPLY, ids=lambda row: row.module)
def test_everything_that_a_row_names_is_in_its_upstream(row):
    module = importlib.import_module(row.module)
    for name, kind in row.names.items():
        assert hasattr(module, name), name
        if kind == LATER and inspect.isclass(real := getattr(module, name)):
            # So no instance of it is there before the module runs, and `isinstance` may say no.
            home, inside = real.__module__, f"{row.module}."
            assert home == row.module or (home.startswith(inside) and home not in row.free), home
        if kind not in (LATER, REPLAYED, DISABLED) and isinstance(kind, str):
            assert getattr(importlib.import_module(kind), name) is getattr(module, name)
    for name in row.free:
        assert name.startswith(f"{row.module}.")
        assert importlib.import_module(name)
    for importer in row.importers:
        assert importer == NATIVE or importlib.util.find_spec(importer.rstrip(".")), importer


def test_every_change_names_symbols_of_its_upstream():
    for row in [row for row in TABLE if isinstance(row, Change) and row.applies()]:
        module = importlib.import_module(row.module)
        assert all(hasattr(module, name) for name in row.symbol.split(", "))


def test_every_row_says_what_it_saves_and_when_it_goes():
    assert all(row.until and row.versions and row.seconds >= 0 for row in TABLE)
    assert len({row.module for row in TABLE}) == len(TABLE)


def test_another_version_of_the_upstream_is_imported_as_ever(monkeypatch):
    stand_in_rows._installed.cache_clear()
    monkeypatch.setattr(stand_in_rows, "version", lambda package: "99.0")
    assert not any(row.applies() for row in TABLE)
    stand_in_rows._installed.cache_clear()


def test_the_table_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(stand_in_rows.SWITCH, "off")
    assert not any(row.applies() for row in TABLE)
    monkeypatch.setenv(stand_in_rows.SWITCH, "accelerate,accelerate.hooks")
    assert [row.module for row in APPLY if not row.applies()] == [
        row.module for row in APPLY if row.module in ("accelerate", "accelerate.hooks")]


def test_a_program_that_imports_the_package_is_left_as_it_is():
    import gqa_export.api

    assert gqa_export.api
    assert not any(isinstance(finder, Finder) for finder in sys.meta_path)
    assert not any(isinstance(module, Deferred) for module in list(sys.modules.values()))


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """A package whose modules note that they ran, and a row for it; its versions are whatever is installed."""
    def write(name: str, text: str) -> None:
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(textwrap.dedent(text), encoding="utf-8")

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(stand_in_rows, "_installed", lambda package: "1.0")
    for name in [name for name in sys.modules if name.split(".")[0] in ("heavy", "user", "stranger")]:
        monkeypatch.delitem(sys.modules, name)
    write("heavy/__init__.py", """
        ran = True
        marked = []
        class Thing:
            def __init__(self, size=1): self.size = size
        def mark(function):
            marked.append(function.__name__)
            return function
        from .inner import deep
        import heavy.light
        """)
    write("heavy/inner.py", "from heavy.light import value\ndeep = value + 1\n")
    write("heavy/light.py", "value = 41\n")
    write("user.py", """
        import heavy
        from heavy import Thing, mark
        from heavy.light import value
        @mark
        def marked(): return 5
        def is_thing(one): return isinstance(one, Thing)
        def make(): return Thing(size=3)
        """)
    write("stranger.py", "from heavy import Thing\n")
    ends = []

    def put(**fields):
        row = StandIn("heavy", "heavy", ("1.0",), 0.1, "never", **{
            "names": {"Thing": LATER, "mark": REPLAYED}, "importers": ("user",), "free": ("heavy.light",), **fields})
        ends.append(install([row]))

    yield put, write
    for end in ends:
        end()
    for name in [name for name in sys.modules if name.split(".")[0] in ("heavy", "user", "stranger")]:
        del sys.modules[name]


def waits(name: str) -> bool:
    return isinstance(sys.modules[name], Deferred)


def test_a_module_waits_until_something_of_it_is_used(upstream):
    put, _ = upstream
    put()
    import user

    assert (user.value, user.marked()) == (41, 5)
    assert not user.is_thing(7), "a class that does not exist yet has no instances"
    assert waits("heavy")
    module = sys.modules["heavy"]
    assert user.make().size == 3
    assert type(module) is types.ModuleType
    assert module is sys.modules["heavy"] is user.heavy
    assert user.Thing is module.Thing, "the real one is in the place of its stand-in"
    assert (user.is_thing(user.make()), user.is_thing(7)) == (True, False)
    assert module.marked == ["marked"], "what the decorator was given is given to the real one"
    assert (module.deep, module.light.value) == (42, 41)


def test_whoever_is_not_named_gets_the_real_module(upstream):
    put, _ = upstream
    put()
    import user

    assert waits("heavy")
    held = user.Thing
    import stranger

    assert not waits("heavy")
    assert inspect.isclass(stranger.Thing)
    assert user.Thing is stranger.Thing, "the stand-ins that were given out before are gone"
    assert type(held) is Later
    assert isinstance(stranger.Thing(), held), "one that is still held means the same class"


@pytest.mark.parametrize("use", ["module.ran", "dir(module)", "importlib.import_module('heavy.inner')",
                                 "exec('from heavy import *', {})", "run(module)", "issubclass(int, user.Thing)"])
def test_every_way_into_a_module_runs_it_or_needs_nothing_of_it(upstream, use):
    put, _ = upstream
    put()
    import user

    module = user.heavy
    result = eval(use, {"module": module, "importlib": importlib, "user": user, "run": run})
    assert not waits("heavy") or result is False
    assert module.deep == 42


def test_an_import_that_fails_fails_where_it_is_used_and_again(upstream):
    put, write = upstream
    write("heavy/__init__.py", "raise ImportError('no engine')\n")
    put(free=())
    import heavy

    for _ in range(2):
        with pytest.raises(ImportError, match="no engine"):
            heavy.ran  # noqa: B018
        assert "heavy" not in sys.modules, "a module that failed is not imported, here as ever"
        heavy = importlib.import_module("heavy")


@pytest.fixture
def slow(upstream, monkeypatch):
    """A module whose code stops halfway until `go` is set; a function that looks at it in a thread of its own."""
    put, write = upstream
    gates = types.ModuleType("gates")
    gates.began, gates.go = threading.Event(), threading.Event()
    monkeypatch.setitem(sys.modules, "gates", gates)
    write("heavy/__init__.py", """
        import gates, heavy
        first = 1
        gates.began.set()
        assert gates.go.wait(20)
        knows_itself = hasattr(heavy, "last")
        last = 7
        """)
    put(names={}, free=())
    answers = []

    def look(name):
        def get():
            try:
                answers.append(getattr(sys.modules["heavy"], name))
            except Exception as error:
                answers.append(error)

        thread = threading.Thread(target=get, daemon=True)
        thread.start()
        return thread

    import heavy

    assert waits("heavy")
    yield look, gates, answers, heavy
    gates.go.set()


def test_another_thread_waits_until_the_module_has_run(slow):
    look, gates, answers, heavy = slow
    threads = [look("last")]
    assert gates.began.wait(20)
    threads.append(look("last"))
    threads[1].join(0.2)
    assert threads[1].is_alive(), "what is not there yet will be"
    assert (heavy.first, hasattr(heavy, "__wrapped__")) == (1, False), "for what is there, or never is, nobody waits"
    gates.go.set()
    for thread in threads:
        thread.join(20)
    assert answers == [7, 7]
    assert type(heavy) is types.ModuleType
    assert not heavy.knows_itself, "its own code sees what there is"
    assert not [name for name in vars(heavy) if name.startswith("_gqa")]


def test_nobody_waits_for_ever(slow, monkeypatch):
    """Where the thread that runs the module waits for an import of the one that looks, the name is missing, as it is in
    any module that is imported halfway."""
    look, gates, answers, heavy = slow
    running = look("last")
    assert gates.began.wait(20)
    monkeypatch.setattr(deferred_module, "PATIENCE", 0.1)
    look("last").join(20)
    assert isinstance(answers[0], AttributeError)
    assert "another thread" in str(answers[0])
    gates.go.set()
    running.join(20)
    assert (answers[1], heavy.last) == (7, 7)


def test_a_stand_in_behaves_as_the_class_would(upstream):
    put, _ = upstream
    put()
    import user

    stand_in = user.Thing
    assert [stand_in == other for other in (user.Thing, int)] == [True, False]
    assert waits("heavy")
    or_none = stand_in | None
    assert [isinstance(one, or_none) for one in (None, 7)] == [True, False]
    assert waits("heavy"), "an annotation needs no class"
    assert or_none == (sys.modules["heavy"].Thing | None) == user.Thing | None
    assert (isinstance(user.make(), or_none), or_none | int, hash(or_none)) == (
        True, user.Thing | None | int, hash(user.Thing | None))


def test_a_stand_in_is_in_the_place_of_the_class(upstream):
    put, _ = upstream
    put()
    import user

    stand_in = user.Thing
    assert {stand_in: 1}[sys.modules["heavy"].Thing] == 1, "its place in a table is that of the class"
    assert (stand_in | None) == (sys.modules["heavy"].Thing | None)

    class Child(stand_in):
        """A class that inherits from it."""

    assert (Child().size, stand_in.__name__) == (1, "Thing")


PROGRAM = """
    import sys, types
    from pathlib import Path
    from gqa_export.environment.deferred_module import Deferred
    from gqa_export.environment.stand_ins import stand_in
    stand_in()
    import gqa_export as gqa
    made = [gqa.export(sys.argv[1], Path(sys.argv[2]) / "later", capacity=64)]
    waiting = [name for name, module in sys.modules.items() if isinstance(module, Deferred)]
    assert {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "accelerate", "huggingface_hub.hf_api",
            "torch.quantization", "torch.distributions"} <= set(waiting), waiting
    assert not made[0].exported.remarks, made[0].exported.remarks
    import torch, transformers
    assert len(transformers._class_to_module) < 1000
    model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
    assert len(transformers._class_to_module) > 3000 and "GPT2Model" in dir(transformers)
    tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 7)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)
    assert type(sys.modules["torch._dynamo"]) is types.ModuleType
    assert not [name for name, module in sys.modules.items() if isinstance(module, Deferred)]
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, flex_attention_forward
    assert type(flex_attention_forward) is types.FunctionType is type(ALL_ATTENTION_FUNCTIONS["flex_attention"])
    from transformers.integrations.finegrained_fp8 import _load_finegrained_fp8_kernel as allowed
    assert id(allowed) in torch._dynamo.trace_rules._allowed_callable_ids
    from torch.distributed.tensor import DTensor
    assert sys.modules["transformers.distributed.sharding_utils"].DTensor is DTensor
    again = gqa.export(sys.argv[1], Path(sys.argv[2]) / "now", capacity=64)
    graphs = [(Path(sys.argv[2]) / name / "model.onnx").read_bytes() for name in ("later", "now")]
    assert graphs[0] == graphs[1]
    print("done")
"""


def test_after_an_export_everything_works_and_the_graph_is_the_same(checkpoint, tmp_path):
    """In a process of its own, as the program's is: export, load, generate, compile, export."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PROGRAM), str(checkpoint), str(tmp_path)],
                          capture_output=True, text=True, timeout=240, check=False,
                          env={**os.environ, "GQA_EXPORT_TRACE_CACHE": "off"})
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["done"]), done.stderr[-4000:]


@pytest.mark.parametrize(("verb", "waits"), [("onnx", True), ("validate", True), ("uptrain", False), ("run", False)])
def test_modules_wait_where_the_program_s_verb_uses_little_of_them(verb, waits, monkeypatch):
    class Left(Exception):
        """Instead of the end of this process."""

    def leave(code: int) -> None:
        raise Left(code)

    called: list[str] = []
    for name in ("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM"):  # which the program sets
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(stand_ins, "stand_in", lambda: called.append(verb))
    monkeypatch.setattr(sys, "argv", ["gqa-export", verb])
    monkeypatch.setattr(cli.main, "main", lambda **named: None)
    monkeypatch.setattr(cli.os, "_exit", leave)
    with pytest.raises(Left):
        cli.entry()
    assert bool(called) is waits
