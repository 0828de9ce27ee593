"""How good a model is: what is measured on which data, figures with intervals, and the report of them."""
