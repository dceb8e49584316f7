"""The likelihood of clean rows: objectives that training minimises, and estimates of log p(continuation | context).

Objectives (`objectives/`, `problem`): rows and noise make a problem; the model's predictions have a loss in nats.

Estimates (`estimate`): LLaDA's estimator (Eq. 6 of arXiv 2502.09992) draws how many of the L continuation tokens are
masked, l ~ U{1 ... L}, then which, and weighs the masked tokens' log-probabilities by L / l:

    log p(x | c) >= E_l E_{M: |M| = l} [ L / l * sum over i in M of log p(x_i | c, x without M) ]

`masks` draws the masks so that the estimate has a small variance, `spans` runs them through the model. The choices of
one question share strata and orders, so their difference has a smaller variance than each of them. A continuation with
few possible masks is summed over all of them. The bound of a block-causal model is the sum of its blocks' bounds, each
given the clean blocks before it, which are run once for all samples and choices (`blocks`).

The likelihood of a causal model (autoregressive, or of a causal context) is exact and takes one forward pass. A model
of uniform noise is scored by the loss of its process, with times stratified over the samples
(`estimate.process_bound`).
"""
