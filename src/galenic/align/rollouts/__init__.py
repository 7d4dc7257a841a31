"""Text sampled from the policy, and what is learnt from it.

sampling, endpoint   prompts -> text, by the policy itself or a server
chains               ELO: a sampled chain of thought with the true answer behind it
experience           PPO: sampled answers with rewards, values and advantages (advantages, values)
"""
