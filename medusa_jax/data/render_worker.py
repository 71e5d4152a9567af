"""A process that renders chat templates within bounds of time and memory; `rendering` starts it.

Templates come with models, so they are untrusted: the sandbox stops their code, not their loops.
The argument is the bound of processor time, in seconds a rendering. Each line of stdin asks for
renderings of a template as JSON, each line of stdout has their texts or an error. The process
imports nothing of this package, which would import JAX.
"""

import json
import resource
import signal
import sys
from pathlib import Path

MEMORY = 2**30  # bytes beyond those of the libraries
CHARACTERS = 2**24  # of a text


def main() -> None:
    """Answers until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when this process ends
    from transformers.utils.chat_template_utils import render_jinja_template

    _bound_memory()
    seconds = float(sys.argv[1])
    for line in sys.stdin:
        try:
            asked, texts = json.loads(line), []
            for messages, add_generation_prompt in asked["conversations"]:
                signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends a process
                (text,), _ = render_jinja_template(
                    conversations=[messages],
                    chat_template=asked["template"],
                    add_generation_prompt=add_generation_prompt,
                    **asked["tokens"],
                )
                if len(text) > CHARACTERS:
                    raise ValueError(f"it writes {len(text):,} characters; at most {CHARACTERS:,}")
                texts.append(text)
            answer = {"texts": texts}
        except MemoryError:
            answer = {"error": f"it takes more than {MEMORY // 2**20:,} MiB of memory"}
        except RecursionError:
            answer = {"error": "it is nested too deeply, or calls itself without an end"}
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            answer = {"error": reason[:300]}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def _bound_memory() -> None:
    sizes = Path("/proc/self/statm")  # Linux alone bounds memory so
    if sizes.is_file():
        most = int(sizes.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
