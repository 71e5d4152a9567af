"""The server as a Ray Serve deployment: replicas of the same application behind one address.

    pip install -e '.[serve,ray]'
    python recipes/ray_serve.py --replicas 2 --slots 16 --port 8000

Each replica is a process with a model of its own, on any machine of the cluster (`ray start`).
Ray sends a request to the replica that has least to do, and starts a new replica where one dies.
`--cpus` and `--gpus` say what a replica takes. A replica of `--mesh tensor=N` takes N GPUs.
"""

import dataclasses
import threading
from typing import Any

from medusa_jax.cli import runner
from medusa_jax.errors import needs
from medusa_jax.options import option
from medusa_jax.server.options import ServeOptions

EXAMPLE = "python recipes/ray_serve.py --model DIR --heads DIR --replicas 2"
APPLICATION = "medusa"


@dataclasses.dataclass(kw_only=True)
class RayOptions(ServeOptions):
    """What to serve, and on how many replicas."""

    replicas: int = option(2, least=1, help="copies of the server")
    cpus: float = option(1.0, least=0, help="CPUs that Ray counts for a replica")
    gpus: float = option(0.0, least=0, help="GPUs of a replica")


def deployment(options: RayOptions) -> Any:
    """The application for `ray.serve.run`; each replica loads the model."""
    with needs("ray"):
        from ray import serve

    def build() -> Any:  # in the replica
        from medusa_jax.cli.compilation_cache import keep_programs
        from medusa_jax.server.app import create_app
        from medusa_jax.server.run import key_of, make_service

        keep_programs()
        return create_app(make_service(options, key_of(options.api_key_env)))

    # As many requests as may wait: the application refuses more, with a time to come back.
    most = options.slots + options.max_waiting + 1
    how = {"num_cpus": options.cpus, "num_gpus": options.gpus}
    replicas = serve.deployment(
        num_replicas=options.replicas, ray_actor_options=how, max_ongoing_requests=most
    )

    @replicas
    @serve.ingress(build)
    class Medusa:
        pass

    return Medusa.bind()


def run(options: RayOptions) -> None:
    """Serves until a signal, in the cluster that RAY_ADDRESS names, or in one of this machine."""
    with needs("ray"):
        from ray import serve

    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(deployment(options), name=APPLICATION, route_prefix="/")
    print(f"listening on http://{options.host}:{options.port}", flush=True)
    try:
        threading.Event().wait()
    finally:  # the replicas finish what they have begun
        serve.delete(APPLICATION)


if __name__ == "__main__":
    runner.command(run, RayOptions, __doc__ or "", EXAMPLE)
