"""What a run needs besides its batches: networks, losses, evaluation, log and checkpoints."""
