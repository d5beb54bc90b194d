"""The paths of the server and what each of them does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from megatron.inference.model import ReadyModel
from megatron.inference.serve.chat import ChatTemplate
from megatron.inference.serve.errors import ApiError
from megatron.inference.serve.prompts import Limits, Prompt, chat_prompt, completion_prompts, engine_requests
from megatron.inference.serve.protocol import ChatRequest, CompletionRequest, Sampled, explain
from megatron.inference.serve.replies import Choice, Heading
from megatron.inference.serve.streams import EventStream, Reply, answer
from megatron.inference.serve.worker import BROKEN, EngineWorker
from megatron.model.moe.layer import MoELayer

PAGE = Path(__file__).parent / "page"
PAGE_FILES: Mapping[str, tuple[str, str]] = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
PAGE_HEADERS = {"content-security-policy": "default-src 'self'; frame-ancestors 'none'", "x-content-type-options": "nosniff"}
BODIES: Mapping[str, type[BaseModel]] = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}


@dataclass(frozen=True)
class Service:
    """One model and what answers for it. template: None where the tokenizer has none."""

    ready: ReadyModel
    worker: EngineWorker
    name: str
    limits: Limits
    template: ChatTemplate | None
    started: float = field(default_factory=time.time)

    def description(self) -> dict[str, Any]:
        """The entry of /v1/models: OpenAI's fields, and what the page needs."""
        experts = [
            {"layer": number, "experts": layer.mlp.context.num_experts, "lores": lores_of_an_expert(layer.mlp.experts)}
            for number, layer in zip(self.ready.gpt.layer_numbers, self.ready.gpt.layers, strict=True)
            if isinstance(layer.mlp, MoELayer)
        ]
        own = {"context_length": self.ready.context_length, "chat": self.template is not None, "moe_layers": experts}
        return {"id": self.name, "object": "model", "created": int(self.started), "owned_by": "structmoe-neox", **own}

    def counters(self) -> dict[str, Any]:
        """What happened since the start."""
        return {"uptime_seconds": round(time.time() - self.started, 3), "texts_in_work_or_waiting": self.worker.admitted, **self.worker.counts}

    def check_first(self, request: Sampled, prompts: int) -> None:
        """What is refused before any text is read: another model, and more than there is room for. Raises ApiError."""
        self.check_model(request.model)
        self.worker.check_room(prompts * request.choices)

    def check_model(self, name: str) -> None:
        """Raises ApiError when a request names another model."""
        if name != self.name:
            raise ApiError(404, f"The model '{name}' is not here. This server has '{self.name}'.", param="model", code="model_not_found")

    async def reply(self, request: Sampled, prompts: Sequence[Prompt], http: HttpRequest, kind: str) -> Response:
        """Runs a request. Raises ApiError."""
        call = self.worker.submit(engine_requests(request, prompts, self.limits))
        heading, stops = Heading(self.name, kind), self.ready.stop_tokens
        owners = [prompt for prompt in prompts for _ in range(request.choices)]
        choices = [Choice(heading, number, prompt, self.ready.tokenizer, stops) for number, prompt in enumerate(owners)]
        echo = isinstance(request, CompletionRequest) and bool(request.echo)
        reply = Reply(heading, prompts, choices, echo, request.wants_usage)
        return EventStream(reply, call) if request.stream else await answer(reply, call, http)


def build_app(service: Service) -> FastAPI:
    """The application. It serves no documentation pages, because those of FastAPI load code from elsewhere."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_page(app)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        service.check_first(body, len(body.prompt))
        prompts = await asyncio.to_thread(completion_prompts, service.ready, body)
        return await service.reply(body, prompts, http, "text_completion")

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        service.check_first(body, 1)
        prompt = await asyncio.to_thread(chat_prompt, service.ready, service.template, body)
        return await service.reply(body, [prompt], http, "chat.completion")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.description()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.description()

    @app.get("/health")
    async def health() -> Response:
        alive = service.worker.is_alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> dict[str, Any]:
        return service.counters()

    return app


def _add_page(app: FastAPI) -> None:
    for path, (name, media_type) in PAGE_FILES.items():
        app.add_api_route(path, _sender((PAGE / name).read_bytes(), media_type), methods=["GET"])


def _sender(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return send


def _add_errors(app: FastAPI) -> None:
    """Every failure has OpenAI's form."""

    @app.exception_handler(ApiError)
    async def refused(http: HttpRequest, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, {"retry-after": "1"} if error.status in (429, 503) else None)

    @app.exception_handler(RequestValidationError)
    async def wrong_fields(http: HttpRequest, error: RequestValidationError) -> Response:
        message, param = explain(error.errors()[0], BODIES.get(http.url.path, BaseModel))
        return JSONResponse(ApiError(400, message, param=param).body(), 400)

    @app.exception_handler(HTTPException)
    async def no_such_path(http: HttpRequest, error: HTTPException) -> Response:
        what = {404: f"There is no {http.url.path} here.", 405: f"{http.method} is not what {http.url.path} takes."}
        return JSONResponse(ApiError(error.status_code, what.get(error.status_code, str(error.detail))).body(), error.status_code)

    @app.exception_handler(Exception)
    async def broken(http: HttpRequest, error: Exception) -> Response:
        return JSONResponse(ApiError(500, BROKEN).body(), 500)


def lores_of_an_expert(experts: Any) -> int:
    """How many LoREs an expert of a layer has; 0 where they have none."""
    lores: int = getattr(experts, "num_lores", 0)
    return lores // experts.num_experts
