"""PandaLM's human-labelled test set (Wang et al., 2023): instructions of Self-Instruct, answered by five models.

Source: github.com/WeOpenML/PandaLM, `data/testset-v1.json`. Three annotators vote for the first response, the second,
or a tie. The paper reports 762 prompts without saying which of the 999 rows they are, so a number here names its rule.
"""

HEADLINE = "accuracy on the pairs that a majority of the three annotators decided"
"""The rule is carried out where the rows are read (`preferences`): undecided rows are no pairs, and counted as ties."""
