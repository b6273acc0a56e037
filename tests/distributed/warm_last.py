"""Imported last by the warm parent: what every training asks first is known, and what is there is no garbage."""

import gc

from harness.config.problems import schema_of
from harness.config.run_config import RunConfig
from harness.ranks.process import die_with_parent

die_with_parent()  # or it lives on, with its ranks, after a worker that was killed
schema_of(RunConfig)
gc.collect()
gc.freeze()  # or a rank's collection, of which ZeRO-3 wants one, would go through all that was imported: half a second
