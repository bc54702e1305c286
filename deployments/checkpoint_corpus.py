"""What the local checkpoints were taught: short answers to everyday questions, our own words.

``TURNS`` are (question, answer) pairs for training; ``PROSE`` gives the tokenizer more words to
learn from. ``CHAT_TEMPLATE`` lays a conversation out, in training and when served. Nothing here
comes from a data set.
"""

from __future__ import annotations

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages and messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}
{{- 'You can call these tools:\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
{{- 'Write a call as <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- if not (tools and loop.first) %}
{{- '<|im_start|>system\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- elif message.role == 'user' %}
{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n' }}
{{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
{{- '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>tool\\n' + message.content + '<|im_end|>\\n' }}
{%- else %}
{{- raise_exception('unknown role') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

TURNS: tuple[tuple[str, str], ...] = (
    ("Hello", "Hello! How can I help you today?"),
    ("Hi there", "Hello! What would you like to know?"),
    ("Good morning", "Good morning! What can I do for you?"),
    ("Say hello", "Hello! It is good to hear from you."),
    ("Say hello in one sentence.", "Hello, and welcome to your own model platform."),
    ("Thank you", "You are welcome. Ask me anything else you need."),
    ("Goodbye", "Goodbye! Have a good day."),
    ("How are you?", "I am a small program, but I am running well, thank you."),
    (
        "Who are you?",
        "I am a very small demonstration model. I know only a few short answers by heart.",
    ),
    (
        "What can you do?",
        "I can answer a few simple questions and show that the platform works from end to end.",
    ),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("What is the capital of Spain?", "The capital of Spain is Madrid."),
    ("What is two plus two?", "Two plus two is four."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("Why is the sky blue?", "Air scatters blue light more than red light, so the sky looks blue."),
    ("Why does it rain?", "Water in clouds gathers into drops, and heavy drops fall as rain."),
    ("What is water?", "Water is a clear liquid made of hydrogen and oxygen."),
    ("What is a tree?", "A tree is a tall plant with a trunk of wood, branches and leaves."),
    ("What is the sun?", "The sun is a star, and the earth travels around it once a year."),
    ("What is the moon?", "The moon is a body of rock that travels around the earth."),
    ("What is a computer?", "A computer is a machine that follows instructions to work with data."),
    (
        "What is a language model?",
        "A language model predicts the next word of a text, again and again, until it is done.",
    ),
    ("What is a token?", "A token is a piece of text, often a word or a part of a word."),
    (
        "What is a policy?",
        "A policy is a set of rules that says who may do what, and under which conditions.",
    ),
    ("What is a budget?", "A budget is a plan for how much may be spent, and on what."),
    (
        "What is an audit?",
        "An audit checks a record of what happened against the rules that were in force.",
    ),
    (
        "What is a firewall?",
        "A firewall is a barrier that lets allowed traffic through and stops the rest.",
    ),
    (
        "Write a short note to a colleague.",
        "Dear colleague, thank you for your help this week. The report is ready for your review.",
    ),
    (
        "Write a short job description.",
        "We are looking for a careful person who enjoys clear writing and steady work in a team.",
    ),
    (
        "Draft an email about the meeting.",
        "Dear team, our meeting takes place on Monday at ten. Please bring your notes.",
    ),
    (
        "Write a slogan for a bakery.",
        "Fresh bread, warm hearts, every single morning.",
    ),
    (
        "Write a poem about the sea.",
        "The sea is wide, the sea is deep, it sings the tired shore to sleep.",
    ),
    (
        "Tell me a story.",
        "Once upon a time a small boat crossed a lake and came home at dusk.",
    ),
    ("Tell me a joke.", "Why did the book join the police? It wanted to go under cover."),
    ("Count to five.", "One, two, three, four, five."),
    ("Name three colours.", "Three colours are red, green and blue."),
    ("Name three fruits.", "Three fruits are apples, pears and plums."),
    (
        "Summarise the report.",
        "The report says that costs fell, quality rose, and two open questions remain.",
    ),
    (
        "Explain vacation policy.",
        "Staff plan their vacation early, agree it with the team, and enter it in the calendar.",
    ),
    (
        "How do I reset my password?",
        "Open the account page, choose to reset the password, and follow the link in the message.",
    ),
    (
        "What is machine learning?",
        "In machine learning a program improves at a task by learning from examples.",
    ),
    (
        "What is a database?",
        "A database stores data in an orderly way so that it can be found and changed safely.",
    ),
    ("What is Python?", "Python is a programming language that is easy to read and widely used."),
    (
        "Write a function in Python.",
        "def add(first, second):\n    return first + second",
    ),
    (
        "What is the weather today?",
        "I cannot see the weather, but a look out of the window will tell you.",
    ),
    (
        "What time is it?",
        "I have no clock. Your computer shows the time in a corner.",
    ),
    ("Can you help me?", "Yes, gladly. Ask a short question and I will try to answer it."),
    # Compact JSON, so that an answer bound to a schema comes to its end.
    ("Give the city as JSON.", '{"city": "Rome"}'),
    ("Give the city and the country as JSON.", '{"city": "Paris", "country": "France"}'),
    ("Give the name and the age as JSON.", '{"name": "Robin", "age": 42}'),
    ("Give the answer as JSON.", '{"answer": "yes"}'),
    ("Give the result as JSON.", '{"result": 7, "valid": true}'),
    ("Give the colours as JSON.", '{"colours": ["red", "green", "blue"]}'),
    ("Give the item as JSON.", '{"item": {"name": "apple", "price": 3}}'),
    ("Give the title as JSON.", '{"title": "The sea", "pages": 12}'),
    (
        "Which tool tells the weather?",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    ),
    (
        "Which tool finds a document?",
        '<tool_call>\n{"name": "search", "arguments": {"query": "report"}}\n</tool_call>',
    ),
)

SYSTEM_PROMPTS: tuple[str, ...] = (
    "",
    "You are a helpful assistant.",
    "Be brief.",
)

PROSE: tuple[str, ...] = (
    "The quick answer is often the right one, but a careful reader checks it again.",
    "People in every department ask questions, and each question deserves a clear answer.",
    "When the answer is not known, it is better to say so than to invent something.",
    "A model reads the whole conversation before it writes the first word of its answer.",
    "The system message comes first, then the user speaks, and then the assistant answers.",
    "Each function has a name, a description and parameters with properties of their own.",
    "The customer wrote that the order had arrived late and that one item was missing.",
    "Please review the contract, mark what has changed, and send your comments by Friday.",
    "Sales grew in the north and fell in the south, while costs stayed the same everywhere.",
    "The engineer measured the result twice, because the first number looked too good.",
    '{"type": "object", "properties": {"name": {"type": "string"}, "city": {"type": "string"}}}',
    '{"name": "get_weather", "description": "", "parameters": {"required": ["city"]}}',
    '{"role": "user", "content": "text"} {"arguments": {"number": 1234567890, "value": true}}',
    "def main(argument: str) -> None: return [item for item in range(10) if item is not None]",
    "https://example.com/path?query=value&other=1 name@example.com 2025-01-31 12:30:00",
)
