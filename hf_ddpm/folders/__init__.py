"""Where the journeys meet: what lies in a model's or a run's folder, and how it is read safely."""
