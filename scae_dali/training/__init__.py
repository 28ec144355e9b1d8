"""What a training needs besides its batches: networks, losses, evaluation, log and checkpoints."""
