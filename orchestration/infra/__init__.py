"""Writes the files under infra/ from one set of values."""
