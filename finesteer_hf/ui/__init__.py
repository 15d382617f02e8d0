"""The page of `finesteer ui`: answers side by side, the gate, adapters, a fit of your own. Only `page` needs gradio."""
