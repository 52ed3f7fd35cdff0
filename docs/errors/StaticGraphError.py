import tracejit

with tracejit.Graph() as graph:
    a = graph.placeholder("a", (8, 4))
    b = graph.placeholder("a", (4,))
