"""PUBLISH: a model's folder goes to the Hub, with a card."""
