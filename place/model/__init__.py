"""The PLACE model: encoders, observation extractor, correlation head, projections."""
