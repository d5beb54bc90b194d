"""How tools/serve.py answers requests."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron.config.section import NonNegativeFloat, PositiveInt, Section


class ServeConfig(Section):
    serve_host: str = "127.0.0.1"
    """Address that the server listens on. The default answers programs on the same machine only. `0.0.0.0` answers every machine that can reach this
    one."""
    serve_port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port that the server listens on. 0: the system chooses a free one, and the log names it."""
    serve_model_name: str | None = None
    """Name of the model in requests. None: the name of the directory with the checkpoint."""
    serve_api_key_file: str | None = None
    """File whose first line is a key. Requests to `/v1/` and `/metrics` must then send it (`Authorization: Bearer KEY`). None: no key is needed."""
    serve_max_running: PositiveInt = 8
    """Number of texts that are generated at once. Each of them needs memory for its keys and values."""
    serve_max_waiting: PositiveInt = 256
    """Number of further texts that may wait for their turn. A request that does not fit is refused with status 429."""
    serve_max_body_bytes: PositiveInt = 4194304
    """Largest body of a request. A larger one is refused with status 413."""
    serve_max_prompt_tokens: PositiveInt | None = None
    """Largest number of tokens in one prompt. None: the model's context (`seq_length`) is the only limit."""
    serve_body_seconds: NonNegativeFloat = 30.0
    """Seconds that a client has to send the body of a request. Then it is refused with status 408."""
    serve_shutdown_seconds: NonNegativeFloat = 30.0
    """Seconds that running requests have to finish after SIGTERM or Ctrl-C. Then they end with an error."""
