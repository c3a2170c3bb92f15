"""A traced model: its layers by name, what follows a layer, running it node by node, which channels
go together."""
