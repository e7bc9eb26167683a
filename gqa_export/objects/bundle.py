"""A bundle as the public API hands it out: what can be done with a folder that an export or a build wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import GqaExportError
from .choices import Flavor, Level, Place, Provider, Speculate, check_choices, check_counts, refuse_revision
from .session import Session
from .sources import opened, path_of, pickles_allowed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from ..bisect.bisection import Bisection
    from ..bundle.manifest import Manifest
    from ..compare.verdict import Verdict
    from ..engine.build import EngineBuild
    from ..exporting.to_onnx import Export
    from ..progress import Progress
    from ..runtime.benchmark import Speed
    from ..runtime.completion import Completion, Extras
    from ..runtime.conversation import Conversation
    from ..runtime.session import Session as InnerSession
    from ..runtime.text import BundleText


@dataclass(frozen=True)
class Bundle:
    """A bundle folder: `model.onnx` (or an engine), weights, manifest, tokenizer. Only the manifest is in memory.

    Attributes:
        folder: where it is.
        manifest: what it says of itself.
        exported: what the export did, notes and fallbacks included; None for a bundle that was opened or built.
        built: what the engine build did; None for a bundle that was opened or exported.
    """

    folder: Path
    manifest: Manifest
    exported: Export | None = None
    built: EngineBuild | None = None

    def validate(self, against: Place | PreTrainedModel, *, level: Level = "quick", steps: int | None = None,
                 text: Place | None = None, provider: Provider = "auto", as_dtype: Literal["fp32"] | None = None,
                 full_hash: bool = False, check_hashes: bool = True, revision: str | None = None,
                 allow_pickle: bool = False, reference: Place | PreTrainedModel | None = None,
                 max_kl: float | None = None, max_perplexity_increase: float | None = None,
                 calibrate: Place | None = None, lora: Place | None = None, max_loss: float | None = None,
                 min_copy: float | None = None, lengths: Sequence[int] = (),
                 progress: Progress | None = None) -> Verdict:
        """Compare the bundle with PyTorch, step by step: logits, every new key and value, the whole cache.

        Args:
            against: the checkpoint it was made from, or the model in memory.
            level: which cases are run. steps: decode steps of each case; None is the level's number.
            text: a UTF-8 file whose perplexity is measured too, and the loss.
            provider: where ONNX Runtime runs the bundle; "auto" is CUDA if it is there.
            as_dtype: "fp32" checks the fp32 twin of a bf16 or fp16 bundle.
            full_hash: compute the sha256 of every file, however large. check_hashes: False checks sizes only.
            revision: of a hub id; None is the commit that the manifest names.
            allow_pickle: also read weights from pickle files; no code of theirs is run.
            reference: the checkpoint before it was quantized, or the model in memory: the loss against it is measured,
                on `text` or on a short text that comes with the package. None: the loss is not measured.
            calibrate: the text that the bundle was exported with, if any: what was chosen with it is measured again.
            max_kl: the most that the mean KL divergence from the reference may be, in nats; None: no limit.
            max_perplexity_increase: the most that perplexity may increase by, in percent; None: no limit.
            lora: the folder of an adapter: PyTorch's model has it merged, and of a bundle that can switch, the adapter
                of this name is in use. None is the base model.
            max_loss: the most that approximate attention for long prompts may lose on `text`, in nats per token.
                min_copy: the least copy score (see docs/long-context.md). None: no limit.
            lengths: tokens of the prompts that this is measured on; () is one length that fits.

        Returns:
            The verdict: `passed`, `compared`, `cases`, `to_json()`; `check()` raises `OutputDiffers` if it failed.

        Raises:
            InvalidBundle: the bundle is damaged or belongs to another checkpoint.
            NotCheckedHere: this machine cannot run the comparison.
        """
        from ..bundle.source_checkpoint import open_for
        from ..checkpoint.lora import read_adapter, with_adapter
        from ..validation.long_loss import LongRequest
        from ..validation.loss import LossRequest
        from ..validation.validate import validate

        check_choices(level=level, provider=provider, as_dtype=as_dtype)
        check_counts(steps=steps)
        if not isinstance(against, str | Path):
            refuse_revision(revision, type(against).__name__, "a model in memory")
        text_only = bool(self.manifest.source.get("text_only"))
        limits = (path_of(text), max_kl, max_perplexity_increase, path_of(calibrate))
        LossRequest(str(reference) if reference is not None else None, *limits).check()
        long = LongRequest(path_of(text), tuple(sorted(set(lengths))), max_loss, min_copy)
        long.check(self.manifest, str(self.folder))
        with (pickles_allowed(allow_pickle), opened(against, text_only=text_only) as source,
              nullcontext() if reference is None else opened(reference, text_only=text_only) as before):
            checkpoint = open_for(self.manifest, source, revision)
            if lora is not None:
                checkpoint = with_adapter(checkpoint, read_adapter(lora))
            return validate(self.folder, checkpoint, level=level, steps=steps or 0, text=path_of(text),
                            provider=provider, as_dtype=as_dtype, full_hash=full_hash, check_hashes=check_hashes,
                            progress=progress, loss=LossRequest(before, *limits), long=long)

    def record(self, verdict: Verdict) -> Bundle:
        """Write a verdict on this bundle into its manifest, which may be read anywhere then; one that is there goes.

        Args:
            verdict: what `validate` gave.

        Returns:
            The bundle with that manifest.

        Raises:
            GqaExportError: the folder cannot be written.
        """
        from ..bundle.record_verdict import record
        from ..bundle.recorded_verdict import MOST, RecordedLoss, RecordedVerdict

        loss, kept = verdict.loss, None
        if loss is not None:
            found = (loss.kl_mean, loss.kl_p99, loss.top1, loss.perplexity_increase)
            if all(abs(number) <= MOST for number in found):  # a bundle whose logits are NaN failed, and lost no number
                kept = RecordedLoss(loss.reference, loss.text, loss.tokens, *found)
        return replace(self, manifest=record(self.folder, self.manifest, RecordedVerdict(
            verdict.passed, verdict.level, len(verdict.cases), verdict.checked_dtype, verdict.reference_dtype,
            verdict.provider, verdict.activations, verdict.export_exact, verdict.as_shipped, kept)))

    def session(self, *, provider: Provider = "auto", low_memory: bool = False, threads: int | None = None,
                exact: bool = False) -> Session:
        """Open the bundle for running: in ONNX Runtime, or in TensorRT if it holds an engine.

        Args:
            provider: "auto" is CUDA if it is there. low_memory: leave the weights in their files, a tenth slower.
            threads: of ONNX Runtime; None lets it choose.
            exact: do not use the graph for long prompts, where there is one. An engine takes none of the four.
        """
        return Session(self._open(provider, low_memory, threads, exact))

    def complete(self, prompt: str | None = None, *, token_ids: Sequence[int] | None = None, chat: bool = False,
                 system: str | None = None, max_new_tokens: int = 128, temperature: float = 0.0, top_k: int = 0,
                 top_p: float = 1.0, seed: int | None = None, provider: Provider = "auto", low_memory: bool = False,
                 threads: int | None = None, session: Session | None = None,
                 on_text: Callable[[str], None] | None = None, progress: Progress | None = None,
                 chat_template: str | None = None, template_args: Mapping[str, object] | None = None,
                 exact: bool = False, adapter: str | None = None, min_p: float = 0.0, repetition_penalty: float = 1.0,
                 stop: Sequence[str] = (), logprobs: int | None = None, json_schema: Place | None = None,
                 speculate: Speculate | None = None,
                 hook: Callable[[int, npt.NDArray[np.float32]], None] | None = None) -> Completion:
        """Continue a prompt, and tell what was fed, what came, and how fast.

        Args:
            prompt: text. token_ids: the prompt as ids instead; needs no tokenizer.
            chat: put the prompt into the model's chat template, with `system` as the system message.
            max_new_tokens: stop after so many. temperature: 0 is greedy. top_k: 0 is all. top_p: 1 is all.
            seed: makes sampling repeatable.
            session: one that is open already (it is reset); else one is opened with the three options before it, and
                `exact`: without the graph for long prompts, where the bundle has one.
            on_text: called with each piece of text as it comes.
            chat_template: name of the template, of a model that has several; None is its default one.
            template_args: variables for the template, such as {"enable_thinking": False} or {"tools": [...]}.
            min_p: keep tokens with this share of the best one's probability. repetition_penalty: 1 is none.
            stop: texts that end the answer, which they are not part of.
            logprobs: record the log-probability of each new token, and of so many of the best ones.
            json_schema: a file with a JSON schema that the answer shall fit (needs the extra `guidance`).
            speculate: "ngram" guesses tokens from the text so far; the answer is the same, sooner where it repeats.
            hook: called with (row, logits [vocabulary]) before each choice; may change the logits in place.
            adapter: name of one of the bundle's LoRA adapters; None leaves the one that an open session uses.
        """
        from ..runtime.completion import complete, prompt_ids
        from ..runtime.open_session import with_shared_seed
        from ..runtime.sampling import Sampling

        check_choices(provider=provider)
        if session is not None and (provider != "auto" or low_memory or threads or exact):
            raise GqaExportError("provider, low_memory, threads and exact open a session; an open one was given",
                                 "session", "give either the session or these options", code="E-OPTION-SESSION")
        sampling = Sampling(temperature, top_k, top_p, seed, min_p, repetition_penalty)
        text = self._text(prompt is not None)
        extras = self._extras(stop, hook, logprobs, json_schema, speculate)
        ids = prompt_ids(prompt, None if token_ids is None else list(token_ids), chat, system, text, chat_template,
                         template_args)
        if progress is not None:
            progress(f"loading {self.folder.name}", None, None)
        runner = session or Session(self._open(provider, low_memory, threads, exact))
        if adapter is not None:
            runner.use_adapter(adapter)
        sampling = with_shared_seed(runner.inner, sampling)
        return complete(runner.inner, ids, text, max_new_tokens=max_new_tokens, sampling=sampling, on_text=on_text,
                        end_tokens=self.manifest.tokens.get("eos", ()), extras=extras)

    def generate(self, prompt: str, *, max_new_tokens: int = 128, chat: bool = False, system: str | None = None,
                 temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None,
                 session: Session | None = None, chat_template: str | None = None,
                 template_args: Mapping[str, object] | None = None) -> str:
        """The text that `complete` continues a prompt with. Arguments as there."""
        done = self.complete(prompt, max_new_tokens=max_new_tokens, chat=chat, system=system, temperature=temperature,
                             top_k=top_k, top_p=top_p, seed=seed, session=session, chat_template=chat_template,
                             template_args=template_args)
        return done.text or ""

    def benchmark(self, *, prompt_tokens: int = 128, new_tokens: int = 64, batch: int = 1, repeat: int = 3,
                  provider: Provider = "auto", low_memory: bool = False, threads: int | None = None,
                  exact: bool = False, progress: Progress | None = None) -> Speed:
        """Load time, tokens per second and memory, on random prompts; medians of `repeat` runs. exact: as of
        `session`."""
        from ..runtime.benchmark import measure

        return measure(self.folder, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, repeat=repeat,
                       provider=provider, low_memory=low_memory, threads=threads or 0, exact=exact,
                       report=progress)

    def bisect(self, against: Place, *, ignore_unused: bool = False) -> Bisection:
        """Find the first layer and operator whose output is out of tolerance, each fed with PyTorch's own inputs.
        ignore_unused: note tensors of the checkpoint that its model does not use; otherwise they are refused."""
        from ..bisect.bisection import bisect

        return bisect(self.folder, str(against), ignore_unused)

    def build_engine(self, output: Place, *, flavor: Flavor = "auto", compute_capability: Sequence[str] = (),
                     max_batch: int = 1, max_prompt: int | None = None, timing_cache: Place | None = None,
                     strip_weights: bool = False, workspace_mb: int | None = None, force: bool = False,
                     progress: Progress | None = None) -> Bundle:
        """Build a TensorRT engine of this bundle, whose target is trt-plugin or trt-native. Arguments as of
        `gqa_export.build_engine`."""
        from ..engine.build import EngineOptions, build_engine

        options = EngineOptions("", "auto", 0, flavor, tuple(compute_capability), max_batch, max_prompt or 0,
                                path_of(timing_cache), strip_weights, workspace_mb or 0, force)
        built = build_engine(self.folder, Path(output), options, progress)
        return Bundle(built.folder, built.manifest, built=built)

    def conversation(self, *, system: str | None = None, chat_template: str | None = None,
                     template_args: Mapping[str, object] | None = None, adapter: str | None = None,
                     provider: Provider = "auto", low_memory: bool = False, threads: int | None = None,
                     exact: bool = False) -> Conversation:
        """A chat of several turns: `say` feeds what the cache does not hold yet. Arguments as of `complete`."""
        from ..runtime.conversation import Conversation
        from ..runtime.text import BundleText

        check_choices(provider=provider)
        text, runner = BundleText(self.folder), Session(self._open(provider, low_memory, threads, exact))
        if adapter is not None:
            runner.use_adapter(adapter)
        return Conversation(runner.inner, text, self.manifest.tokens.get("eos", ()), system, chat_template,
                            template_args)

    def _extras(self, stop: Sequence[str], hook: Callable[[int, npt.NDArray[np.float32]], None] | None,
                logprobs: int | None, json_schema: Place | None, speculate: Speculate | None) -> Extras:
        from ..runtime.completion import Extras
        from ..runtime.guidance import json_guide
        from ..runtime.speculation import KINDS, Draft

        check_choices(speculate=speculate)
        guide = None
        if json_schema is not None:
            guide = json_guide(self.folder, Path(json_schema), self.manifest.tokens.get("eos", ()))
        draft = Draft(KINDS[speculate], self.manifest.verify_width) if speculate else None
        return Extras(tuple(stop), hook, logprobs, guide, draft)

    def _open(self, provider: str, low_memory: bool, threads: int | None, exact: bool) -> InnerSession:
        from ..runtime.open_session import open_bundle as open_inner

        return open_inner(self.folder, provider, low_memory=low_memory, threads=threads or 0, exact=exact)

    def _text(self, wanted: bool) -> BundleText | None:
        from ..runtime.text import BundleText, has_tokenizer

        return BundleText(self.folder) if wanted or has_tokenizer(self.folder) else None
