PROMPT = ("You are given a premise and a hypothesis below. If the premise entails the  hypothesis, return 0. "
          "If the premise contradicts the hypothesis, return 2.  Otherwise, if the premise does neither, return 1.\n\n"
          "### Premise: {premise}\n\n### Hypothesis: {hypothesis}\n\n### Label:")
