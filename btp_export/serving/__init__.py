"""Answering requests over HTTP: OpenAI's chat completions in front of a bundle, on one machine or as a Ray application.

    refusals           what a request is refused with
    limits             how much a request may take, and where its picture may come from
    schemas            requests, as OpenAI's clients send them
    questions          what a request asks of the model
    addresses          the picture at the address that a request names
    preparing_client   asks a process of its own, `preparing_process`, which opens pictures and writes prompts
    gathering          the queue that gathers requests into the profile's static batch
    worker             the one thread that runs the models;  stops  texts that end an answer
    service            all of these together: a request in, events out
    answers            events as OpenAI's answers
    metrics            counters and times for Prometheus
    app                the HTTP application;  guard  what every request passes;  page  what it shows at /
    server             the process: sockets, signals
    ray_application    several machines: a Ray Serve application

May use btp_export.running, .model and .drawing. Only app, guard, metrics, server and ray_application import what the
extra `serve` brings.
"""

from typing import Any

__all__ = ["ray_app"]


def __getattr__(name: str) -> Any:
    """`ray_app`, which imports Ray and all that runs a bundle, when it is asked for."""
    if name != "ray_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from btp_export.extras import SERVE, naming

    with naming(SERVE):
        from btp_export.serving.ray_application import ray_app
    return ray_app
