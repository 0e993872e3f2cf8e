"""What a training does with adapters, free of any trainer: annealing, calibrating, checking, recording, saving."""
