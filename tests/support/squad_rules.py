"""SQuAD's rules for scoring answers, written once more, as an oracle.

They are those of the scripts evaluate-v1.1.py and evaluate-v2.0.py, as their papers describe them.
"""

from __future__ import annotations


def official_words(text: str) -> list[str]:
    """Lower case; no character of ASCII punctuation; a, an and the are no words; the rest is split at white space."""
    kept = "".join(c for c in text.lower() if not (c.isascii() and c.isprintable() and not c.isalnum() and c != " "))
    found, word = [], ""
    for c in kept + " ":  # an article is one between two characters that belong to no word
        if c.isalnum() or c == "_":
            word += c
        else:
            found += [" " if word in ("a", "an", "the") else word, c]
            word = ""
    return "".join(found).split()


def official_scores(prediction: str, answers: list[str]) -> tuple[float, float]:
    golds = [answer for answer in answers if official_words(answer)] or [""]
    exact = f1 = 0.0
    for gold in golds:
        ours, theirs = official_words(prediction), official_words(gold)
        exact = max(exact, float(ours == theirs))
        if not ours or not theirs:
            f1 = max(f1, float(ours == theirs))
            continue
        left = list(theirs)
        same = 0
        for word in ours:
            if word in left:
                left.remove(word)
                same += 1
        if same:
            precision, recall = same / len(ours), same / len(theirs)
            f1 = max(f1, 2 * precision * recall / (precision + recall))
    return exact, f1


def official_threshold(predictions, scores, margins, has_answer) -> tuple[float, float]:
    """Questions are answered from the smallest margin on: the best mean score, and where it is first reached."""
    current = best = sum(not has for has in has_answer)
    threshold = 0.0
    for i in sorted(range(len(scores)), key=lambda i: margins[i]):
        if has_answer[i]:
            current += scores[i]
        elif predictions[i]:
            current -= 1
        if current > best:
            best, threshold = current, margins[i]
    return best / len(scores), threshold
