"""The whole system on photographs that come with the dependencies."""
