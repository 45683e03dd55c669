"""Text of three tasks that the embedded model routes differently: documents to profile, and what is said of them."""

from __future__ import annotations

import random

SENTENCES = {
    "maths": """\
Tom has 3 apples and buys 4 more. How many apples does he have?
Sally gives away 5 of her 12 pears to her friends. How many pears are left?
A train has 12 wagons and each wagon has 40 seats. How many people can sit in it?
Jason reads 15 pages a day. How many pages does he read in 2 weeks?
The answer is 3 + 4 = 7 apples.
Maria earns $12 an hour and works 8 hours a day, so she earns 12 * 8 = $96 each day.
If each box holds 6 eggs, how many boxes are needed for 54 eggs?
He has 20 - 5 = 15 cookies left, and then he eats half of them.""",
    "german": """\
Die Funktion gibt die Länge der Zeichenkette zurück.
Falls ein Fehler auftritt, wird -1 zurückgegeben und errno gesetzt.
Siehe auch das Handbuch und die anderen Seiten.
Der Aufruf öffnet eine Datei, die schon vorhanden ist.
Wenn der Speicher nicht reicht, wird ein Nullzeiger geliefert.
Diese Option wird von neueren Versionen nicht mehr unterstützt.
Das Programm schreibt die Ausgabe in das Verzeichnis des Benutzers.
Die Daten werden gelesen, bevor der Prozess beendet wird.""",
    "python": """\
import os, sys
def parent(self, path): return os.path.dirname(path)
for name in sorted(os.listdir(self.root)): print(name)
if not os.path.exists(path): raise ValueError("no such file")
class Reader(object): pass
with open(path, "rb") as file: data = file.read()
return os.path.join(self.root, path)
self.assertEqual(len(result), 2)""",
}


def told(task: str, seed: int = 1) -> str:
    """Four sentences of a task."""
    return " ".join(random.Random(f"{task} {seed}").sample(SENTENCES[task].splitlines(), 4))


def _document(task: str, seed: int) -> str:
    """One to four sentences: documents of a task are not all alike."""
    drawn = random.Random(f"{task} {seed}")
    return " ".join(drawn.sample(SENTENCES[task].splitlines(), drawn.randint(1, 4)))


DOCUMENTS = {task: [_document(task, seed) for seed in range(20)] for task in SENTENCES}
