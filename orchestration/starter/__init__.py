"""How the starter model is made: its photographs, and the steps from them to the weights inside `pipeline`."""
