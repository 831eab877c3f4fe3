"""Files of models: header, names, layouts, and what is decided from them before loading."""
