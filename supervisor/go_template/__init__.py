"""Go templates, as Modelfiles use them: read and rendered."""
