"""What Triton Inference Server's Python backend runs: prompts in, tokens streamed out, from an engine bundle.

Imported by the `model.py` that `gqa-export trt --triton-repository` writes; inputs and outputs as in its config.pbtxt.
`triton_python_backend_utils` is Triton's own and exists only inside the server.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.manifest import read_manifest
from ..errors import GqaExportError

DEFAULT_NEW_TOKENS = 128
log = logging.getLogger(__name__)


def load_session(folder: Path) -> Any:
    """The session of an engine bundle."""
    from ..runtime.tensorrt.session import EngineSession

    return EngineSession.load(folder)


class TritonPythonModel:
    """One engine, one request at a time; every token is a response of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine beside model.py. Raises GqaExportError, which Triton shows."""
        self.triton = importlib.import_module("triton_python_backend_utils")
        folder = Path(args["model_repository"]) / args["model_version"] / "engine"
        self.ends = tuple(read_manifest(folder).tokens.get("eos", ()))
        self.session = load_session(folder)

    def execute(self, requests: list[Any]) -> None:
        """Answer each request through its response sender: tokens, then the final flag; an error is its answer,
        whatever it is: a request without a final answer hangs in the server, and those after it with it."""
        ending: BaseException | None = None
        for request in requests:
            try:
                self._serve(request)
            except Exception:  # even the answer cannot be sent: the client has gone
                log.exception("a request could not be answered")
            except BaseException as error:  # the process is to end, once the others have their answers
                ending = error
        if ending is not None:
            raise ending

    def _serve(self, request: Any) -> None:
        sender = request.get_response_sender()
        final = self.triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            self._answer(request, sender)
        except BaseException as error:
            if isinstance(error, GqaExportError):
                text = str(error)
            else:
                log.exception("a request failed")
                text = f"{type(error).__name__}: {error} (the server's log has the traceback)"
            sender.send(self.triton.InferenceResponse(error=self.triton.TritonError(text)), flags=final)
            if not isinstance(error, Exception):
                raise
        else:
            sender.send(flags=final)

    def _answer(self, request: Any, sender: Any) -> None:
        from ..runtime.generate import generate
        from ..runtime.sampling import Sampling

        prompt = self._value(request, "input_ids")
        if prompt is None or prompt.size == 0:
            raise GqaExportError("the prompt of the request is empty", "input_ids", "send at least one token id",
                                 code="E-RUN-PROMPT")
        seed = self._number(request, "seed", -1)
        sampling = Sampling(float(self._number(request, "temperature", 0.0)), seed=int(seed) if seed >= 0 else None)

        def send(_row: int, token: int) -> None:
            tensor = self.triton.Tensor("token", np.array([token], np.int32))
            sender.send(self.triton.InferenceResponse(output_tensors=[tensor]))

        generate(self.session, [[int(token) for token in prompt.reshape(-1)]],
                 int(self._number(request, "max_new_tokens", DEFAULT_NEW_TOKENS)), self.ends, send, sampling=sampling)

    def _value(self, request: Any, name: str) -> np.ndarray | None:
        tensor = self.triton.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    def _number(self, request: Any, name: str, default: float) -> float:
        value = self._value(request, name)
        return default if value is None or value.size == 0 else value.reshape(-1)[0].item()
