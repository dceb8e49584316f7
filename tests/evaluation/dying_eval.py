"""`redraft eval` in two processes, of which the second is killed when it is about to generate."""

import os
import signal
import sys

from redraft.cli.eval import main
from redraft.language_model import LanguageModel
from redraft.training import launch as launching

IS_WORKER = "LOCAL_RANK" in os.environ
if IS_WORKER:
    generate = LanguageModel.generate

    def dying(self, prompts, **settings):
        if os.environ["LOCAL_RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(self, prompts, **settings)

    LanguageModel.generate = dying
    sys.exit(main(sys.argv[2:]))

original = launching.launch
launching.launch = lambda *args, **settings: original(*args, module="dying_eval", **settings)
sys.exit(main([*sys.argv[1:], "--processes", "2"]))
