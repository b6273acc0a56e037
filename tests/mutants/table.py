"""All mutants, by the room of the house that they are in."""

from tests.mutants import deciding, judging, loading, opening, reading, saving, training
from tests.mutants.mutant import Mutant

ROOMS: dict[str, tuple[Mutant, ...]] = {
    "loop": training.LOOP,
    "interval": training.INTERVAL,
    "ddp": training.DDP,
    "zero": training.ZERO,
    "average, noise, loss scale": training.AVERAGE_NOISE_SCALE,
    "order": training.ORDER,
    "checkpoint": saving.CHECKPOINT,
    "resume": saving.RESUME,
    "ledger": saving.LEDGER,
    "stopping": deciding.STOPPING,
    "judging": judging.JUDGING,
    "schedule": deciding.SCHEDULE,
    "agenda": deciding.AGENDA,
    "config": deciding.CONFIG,
    "loading": loading.LOADING,
    "opening": opening.OPENING,
    "reading": reading.READING,
    "tracking": deciding.TRACKING,
    "slurm": deciding.SLURM,
}
MUTANTS = tuple(mutant for room in ROOMS.values() for mutant in room)
