"""Chat templates are programs: one that comes with a checkpoint may never end, or fill the memory.

Jinja's sandbox limits neither. So a template is first rendered in a separate process with limits on processor time and
memory.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS, MEGABYTES = 2, 1024

_RENDER = """
import json, re, resource, sys
seconds, megabytes, templates = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
from jinja2.sandbox import ImmutableSandboxedEnvironment
env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
env.filters["tojson"] = lambda value, **options: json.dumps(value)
def raise_exception(message):
    raise ValueError(message)
env.globals.update(raise_exception=raise_exception, strftime_now=lambda form: form)
messages = [{"role": role, "content": "hello"} for role in ("user", "assistant", "user")]
for template in templates:
    template = re.sub(r"\\{%-?\\s*(end)?generation\\s*-?%\\}", "", template)
    try:
        env.from_string(template).render(messages=messages, tools=None, add_generation_prompt=True)
    except MemoryError:
        sys.exit(9)
    except Exception:
        pass  # it ends, and may want what is not here
"""


def check_template(path: str | Path, template: Any) -> None:
    """Raise ValueError for a chat template (or several, by name) that does not end, or fills the memory."""
    every = list(template.values()) if isinstance(template, dict) else [template]
    templates = [one for one in every if isinstance(one, str)]
    if not templates or sys.platform == "win32":  # where processes have no limits
        return
    limits_and_templates = json.dumps([SECONDS, MEGABYTES, templates])
    command = [sys.executable, "-I", "-c", _RENDER]
    child = subprocess.run(command, input=limits_and_templates, text=True, capture_output=True)
    if child.returncode not in (0, 1):
        raise ValueError(
            f"{path}: rendering a chat of three words by the chat template takes more than {SECONDS} s or {MEGABYTES} "
            "MB. It is a program that came with the checkpoint: replace it, or leave it out."
        )
