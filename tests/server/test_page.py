"""The chat page in headless Chromium (Debian: chromium); skipped where there is none. NARROWS_SCREENSHOT=FOLDER keeps pictures."""

import json
import os

import pytest

import browser

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture
def page():
    p = browser.Page()
    yield p
    p.close()


def text(page, element):
    return page.run(f"document.getElementById('{element}').textContent")


def picture(page, name):
    if folder := os.environ.get("NARROWS_SCREENSHOT"):
        page.screenshot(os.path.join(folder, name + ".png"))


def test_a_document_is_dropped_asked_about_saved_and_restored(page, server, long_text):
    page.send("Page.navigate", url=server.url + "/")
    page.wait_for("document.readyState === 'complete' && document.getElementById('about').textContent.includes('contexts to')")
    assert page.run("[...document.querySelectorAll('#profile option')].map(o => o.textContent).includes('klt')")

    # Drop a document.
    page.run(f"""(() => {{
        const data = new DataTransfer();
        data.items.add(new File([{json.dumps(long_text[:20000])}], '<b>licence</b>.txt'));
        document.dispatchEvent(new DragEvent('drop', {{dataTransfer: data, bubbles: true, cancelable: true}}));
    }})()""")
    page.wait_for("document.getElementById('document-name').textContent.includes('20.0 thousand')")
    assert "<b>licence</b>" in text(page, "document-name")  # shown, not obeyed

    # Ask: progress first, then the answer comes piece by piece.
    page.run("""(() => {
        document.getElementById('temperature').value = 0;
        document.getElementById('max-tokens').value = 60;
        document.getElementById('question').value = 'What is <i>this</i>?';
        document.getElementById('send').click();
    })()""")
    page.wait_for("/^[1-9][0-9]* of [0-9]+ tokens read/.test(document.getElementById('progress-text').textContent)"
                  " && !document.getElementById('progress').hidden")
    picture(page, "reading")
    page.wait_for("document.querySelectorAll('.message.assistant').length === 1"
                  " && document.querySelector('.message.assistant').textContent.length > 3", seconds=300)
    picture(page, "answering")
    page.wait_for("!document.getElementById('send').disabled", seconds=300)
    assert "What is <i>this</i>?" in page.run("document.querySelector('.message.user').textContent")
    assert page.run("document.querySelector('.message i')") is None
    assert text(page, "bytes-f16").endswith(" MB")
    assert float(text(page, "bytes-f16").split()[0]) > float(text(page, "bytes-kv").split()[0])
    assert float(text(page, "compression")) > 2
    assert float(text(page, "decode-speed")) > 0 and float(text(page, "prefill-speed")) > 0
    assert text(page, "error") == ""
    answer = page.run("document.querySelector('.message.assistant').textContent")

    # Save, and restore in a new page.
    page.run("document.getElementById('session-name').value = 'from-the-page'; document.getElementById('save-button').click()")
    page.wait_for("document.getElementById('session-text').textContent.includes('tokens saved')")
    # The list's button shows all of its word.
    assert page.run("(b => b.scrollWidth <= b.clientWidth && b.offsetHeight < 40)(document.querySelector('#sessions button'))")
    page.run("document.getElementById('sessions').scrollIntoView()")
    picture(page, "saved")
    page.send("Page.reload")
    page.wait_for("document.readyState === 'complete' && document.querySelectorAll('#sessions button').length === 1")
    page.run("document.querySelector('#sessions button').click()")
    page.wait_for("document.getElementById('session-text').textContent.includes('tokens restored')")
    assert page.run("document.querySelector('.message.assistant').textContent") == answer

    # The next question finds the document in the cache.
    page.run("""(() => {
        document.getElementById('max-tokens').value = 4;
        document.getElementById('question').value = 'And who wrote it?';
        document.getElementById('send').click();
    })()""")
    page.wait_for("document.querySelectorAll('.message.assistant').length === 2 && !document.getElementById('send').disabled", seconds=300)
    assert int(text(page, "cached")) > 3000
    assert page.problems == []


def open_page(page, server, width=1200, height=800):
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    page.send("Page.navigate", url="about:blank")
    page.send("Page.navigate", url=server.url + "/")
    page.wait_for("document.readyState === 'complete' && document.getElementById('about').textContent.includes('contexts to')")


def ask(page, question, most=24, wait=True):
    page.run(f"""(() => {{
        document.getElementById('temperature').value = 0;
        document.getElementById('max-tokens').value = {most};
        document.getElementById('question').value = {json.dumps(question)};
        document.getElementById('send').click();
    }})()""")
    if wait:
        page.wait_for("!document.getElementById('send').disabled", seconds=300)


def test_a_question_that_is_refused_goes_back_into_the_box(page, server, long_text):
    open_page(page, server)
    ask(page, long_text + long_text)
    assert "maximum context length is 8192" in text(page, "error")
    assert page.run("document.getElementById('question').value.length") == len((long_text + long_text).strip())
    assert page.run("document.querySelectorAll('.message').length") == 0


def test_answers_that_are_cut_say_so_go_on_and_are_made_again(page, server):
    open_page(page, server)
    ask(page, "Count from one to one hundred in words.", most=8)
    assert "Cut off" in page.run("document.querySelector('.message.assistant .cut').textContent")
    first = page.run("state.messages[1].content")
    page.run("[...document.querySelectorAll('.cut button')].pop().click()")
    page.wait_for("document.getElementById('stop').disabled", seconds=300)
    assert page.run("state.messages.length") == 2
    longer = page.run("state.messages[1].content")
    assert longer.startswith(first) and len(longer) > len(first)
    page.run("[...document.querySelectorAll('.tools button')].find(b => b.textContent === 'Again').click()")
    page.wait_for("document.getElementById('stop').disabled && state.messages.length === 2", seconds=300)
    assert page.run("state.messages[1].content") == first  # temperature 0, the same 8 tokens

    # Another question in the first one's place.
    page.run("[...document.querySelectorAll('.tools button')].find(b => b.textContent === 'Edit').click()")
    assert page.run("document.getElementById('question').value").startswith("Count from one")
    assert not page.run("document.getElementById('editing').hidden")
    ask(page, "Say yes.", most=4)
    assert page.run("state.messages.map(m => m.shown || '')") == ["Say yes.", ""]

    # Kept in this browser, and deleted from it.
    page.send("Page.reload")
    page.wait_for("document.readyState === 'complete' && document.querySelectorAll('.message').length === 2")
    assert "Say yes." in page.run("document.getElementById('chats').textContent")
    page.run("document.getElementById('new').click()")
    page.wait_for("document.querySelectorAll('.message').length === 0")
    page.run("document.querySelector('#chats .open').click()")
    page.wait_for("document.querySelectorAll('.message').length === 2")
    page.run("document.querySelector('#chats button:not(.open)').click()")
    page.wait_for("document.getElementById('chats').textContent === 'none yet'")
    assert page.problems == []


def test_a_long_answer_on_a_phone_is_followed_and_can_be_stopped(page, server):
    open_page(page, server, 390, 700)
    assert page.run("getComputedStyle(document.getElementById('panel')).display") == "none"
    ask(page, "Write a very long story about the sea.", most=2000, wait=False)
    page.wait_for("document.getElementById('messages').scrollHeight > 1.5 * document.getElementById('messages').clientHeight",
                  seconds=300)
    picture(page, "phone-answering")
    for element in ("question", "send", "stop"):
        box = page.run(f"(r => [r.top, r.bottom, r.left, r.right])(document.getElementById('{element}').getBoundingClientRect())")
        assert box[0] >= 0 and box[1] <= 700 and box[2] >= 0 and box[3] <= 390, (element, box)
    assert page.run("atEnd()")
    # Who scrolls up to read is left there.
    page.run("document.getElementById('messages').scrollTop = 0")
    length = page.run("state.messages[1].content.length")
    page.wait_for(f"state.messages[1].content.length > {length} + 100", seconds=300)
    assert page.run("document.getElementById('messages').scrollTop") == 0
    page.run("document.getElementById('stop').click()")
    page.wait_for("document.getElementById('stop').disabled")
    assert page.run("document.querySelector('.cut').textContent").startswith("Stopped.")
    page.run("document.getElementById('panel-button').click()")
    assert page.run("getComputedStyle(document.getElementById('panel')).display") == "block"
    picture(page, "phone-panel")
    assert page.problems == []


def test_files_are_several_and_texts(page, server):
    open_page(page, server)
    assert page.run("getComputedStyle(document.getElementById('clear-document')).display") == "none"
    page.run("""readFiles([new File(['one'], 'a.txt'), new File(['%PDF-1.7'], 'b.pdf'), new File([new Uint8Array([255, 0])], 'c.bin'),
                           new File(['two'], 'd.txt')])""")
    assert "a.txt" in text(page, "document-name") and "d.txt" in text(page, "document-name")
    assert "b.pdf is a PDF" in text(page, "error") and "c.bin is not a text" in text(page, "error")
    assert page.run("getComputedStyle(document.getElementById('clear-document')).display") != "none"
    page.run("document.querySelector('#document-name button').click()")
    assert "a.txt" not in text(page, "document-name")
    ask(page, "What?", most=4)
    assert page.run("state.messages[0].content") == "two\n\nWhat?"
    assert text(page, "document-name") == ""
    assert page.problems == []


HOSTILE = """# <img src=x onerror=alert(1)> title
<script>alert(1)</script> **bold** *leaning* `<b>code</b>` [bad](javascript:alert(1)) [good](https://example.org/a_b) https://example.org/x.
- one
- two
  - three
1. first
> quoted

| a | b |
|---|---|
| 1 | <i>2</i> |

```python" onload="alert(1)
print("<b>")
```
~~~
open"""


def test_markdown_is_shown_and_not_obeyed(page, server):
    open_page(page, server)
    page.run(f"document.getElementById('messages').append(markdown.render({json.dumps(HOSTILE)}))")
    inside = "document.getElementById('messages')"
    assert page.run(f"{inside}.querySelectorAll('script, img, b, i, [onload], [onerror]').length") == 0
    assert page.run(f"[...{inside}.querySelectorAll('a')].map(a => a.href)") == ["https://example.org/a_b", "https://example.org/x"]
    assert page.run(f"{inside}.querySelector('strong').textContent") == "bold"
    assert page.run(f"{inside}.querySelector('em').textContent") == "leaning"
    assert page.run(f"[...{inside}.querySelectorAll('code')].map(c => c.textContent)") == ["<b>code</b>", 'print("<b>")', "open"]
    assert page.run(f"[...{inside}.querySelectorAll('li')].length") == 4
    assert page.run(f"{inside}.querySelector('ul ul li').textContent") == "three"
    assert page.run(f"{inside}.querySelector('td:last-child').textContent") == "<i>2</i>"
    assert page.run(f"{inside}.querySelector('blockquote').textContent") == "quoted"
    assert "<script>alert(1)</script>" in page.run(f"{inside}.textContent")
    picture(page, "markdown")
    # No text takes long.
    for text_ in ("*" * 20000, "`" * 20001, "[" * 20000, "**a" * 7000, "- " * 9000, ">" * 3000 + "x", "| " * 9000 + "\n|-|", "https://" * 3000):
        assert page.run(f"(t => {{ const b = performance.now(); markdown.render(t); return performance.now() - b; }})({json.dumps(text_)})") < 3000, text_[:9]
    assert page.problems == []
