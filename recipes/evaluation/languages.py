"""Whether a text is in English, told from its letters and its commonest words."""

import re

from recipes_minigpt4.evaluation.words import sentences_of, words_of


OTHER_SCRIPT = 0.2  # share of letters outside of the Latin script from which on a text is in another language
ACCENTED = 0.45  # share of words with letters that English does not have, likewise
OF_SENTENCES = 0.2  # share of the words that stand in sentences of another language, likewise
FEW = 12  # words of a text that is too short to lack every common word by chance

# Words that hardly any English text of a few sentences goes without.
ENGLISH = frozenset(
    words_of(
        """a an and are as at be but by for from has have he her his i in is it its like my no not of on one or our out
        so that the their there they this to up was we what where which who with you your"""
    )
)
# The like in other languages, without those that are English words too.
OTHERS = {
    "French": "le la les des est une un dans avec sur qui que il elle ce cette sont au aux du nous vous ses leur et",
    "German": "der das und ist ein eine einen einem einer mit auf dem nicht von zu sich auch sind zwei zeigt steht",
    "Spanish": "el la los las una un con en es del que para se su está y al muy hay sobre esta imagen",
    "Italian": "il lo la gli una un con di che è nel nella della del sul sulla alla si immagine",
    "Portuguese": "os uma um com em é da na no não que para ao dos das são está imagem",
    "Dutch": "de het een en met op zijn niet aan voor naar twee ook staat dat afbeelding",
    "Swedish": "och det som på är ett en av till den bilden har inte",
    "Polish": "jest się nie na że oraz są przez który obraz z w",
    "Turkish": "ve bir bu ile için olan üzerinde resimde",
    "Indonesian": "yang dan di dengan ini itu ada dari pada sebuah gambar",
}
OTHER_WORDS = {language: frozenset(words_of(words)) - ENGLISH for language, words in OTHERS.items()}


def is_english(text: str) -> bool:
    """
    Whether nothing speaks against English.

    Against it speak letters of other scripts, many words with accents, sentences with more common words of another
    language than English ones, and a longer text without any common English word.
    """
    letters, words = re.findall(r"[^\W\d_]", text), words_of(text)
    accented = [word for word in words if re.search(r"[^\W\d_]", word) and not word.replace("’", "").isascii()]
    elsewhere = sum(len(words_of(part)) for part in sentences_of(text) if _is_foreign(words_of(part)))
    return not (
        sum(letter > "\u024f" for letter in letters) > OTHER_SCRIPT * len(letters)
        or (len(accented) > 1 and len(accented) >= ACCENTED * len(words))
        or elsewhere > OF_SENTENCES * len(words)
        or (len(words) >= FEW and not ENGLISH & set(words))
    )


def _is_foreign(words: list[str]) -> bool:
    """Whether a sentence has at least two common words of another language, and more of them than English ones."""
    said = set(words)
    most = max(len(common & said) for common in OTHER_WORDS.values())
    return most > 1 and most > len(ENGLISH & said)
