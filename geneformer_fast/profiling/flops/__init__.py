"""Operations that a model needs, and that were computed."""
