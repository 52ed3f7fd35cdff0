import tracejit

tracejit.load(__file__)
